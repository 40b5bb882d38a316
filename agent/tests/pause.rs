//! Tests that the first process of a pod's pid namespace reaps orphans of
//! containers, whatever they died of.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(20);

/// Runs `husk-agent pause` with two children in sessions of their own, as if
/// containers had left them.
struct Pause(Child);

impl Pause {
    fn start() -> Self {
        let script = "setsid sleep 1000 & setsid sleep 1000 & exec \"$0\" pause";
        let child = Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_husk-agent")]).spawn();
        Self(child.unwrap())
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    fn comm(&self) -> String {
        fs::read_to_string(format!("/proc/{}/comm", self.pid())).unwrap_or_default().trim().to_owned()
    }

    fn children(&self) -> Vec<i32> {
        let list = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid())).unwrap_or_default();
        list.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        for child in self.children() {
            send(child, libc::SIGKILL);
        }
        send(self.pid(), libc::SIGCONT);
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn send(pid: i32, signal: i32) {
    // SAFETY: kill has no memory effects; the processes are this test's own.
    unsafe { libc::kill(pid, signal) };
}

/// The state letter of a process (proc_pid_stat(5)).
fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn orphans_that_died_of_a_real_time_signal_are_reaped() {
    let pause = Pause::start();
    until("it starts", || pause.comm() == "husk-agent" && pause.children().len() == 2);
    let children = pause.children();
    // Both end while it is stopped, so that there is one SIGCHLD for both.
    send(pause.pid(), libc::SIGSTOP);
    until("it stops", || state(pause.pid()) == Some('T'));
    send(children[0], 40);
    send(children[1], libc::SIGKILL);
    until("its children end", || children.iter().all(|child| state(*child) == Some('Z')));
    send(pause.pid(), libc::SIGCONT);
    until("its children are reaped", || pause.children().is_empty());
}
