//! Shells that tell what they began with.
use std::fs;
use std::io::{Read, Seek};
use std::time::{Duration, Instant};

use super::*;

/// The standard error of a shell that runs `script`, started with the options of `with`.
fn told(script: &str, with: impl FnOnce(Detached) -> Detached) -> (Spawned, String) {
    let mut log = tempfile::tempfile().unwrap();
    let shell = Detached::new(Path::new("/bin/sh")).unwrap().arguments(["-c", script]).unwrap();
    let spawned = with(shell.log(log.try_clone().unwrap())).spawn().unwrap();
    wait_gone(spawned.pid);
    let mut text = String::new();
    log.rewind().unwrap();
    log.read_to_string(&mut text).unwrap();
    (spawned, text)
}

/// Waits until a process has ended, and is no zombie.
fn wait_gone(pid: u32) {
    let start = Instant::now();
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "process {pid} was not waited for");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_program_has_its_descriptors_and_no_others() {
    // Neither is marked to be closed, and the first sits where one is to go.
    let leaked = tempfile::tempfile().unwrap();
    // SAFETY: copies a descriptor to a number that nothing else has.
    assert_eq!(unsafe { libc::dup2(leaked.as_raw_fd(), 777) }, 777);
    let mut first = tempfile::tempfile().unwrap();
    let (second, third) = (first.try_clone().unwrap(), first.try_clone().unwrap());
    let (_, text) = told("echo a >&4; echo b >&3; cd /proc/self/fd; echo * >&2", |shell| {
        shell.stdin(third.into()).descriptor(first.try_clone().unwrap().into()).descriptor(second.into())
    });
    // SAFETY: the number is this test's.
    unsafe { libc::close(777) };
    let open: Vec<u32> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
    // The shell has the directory open that it reads.
    assert!(open.starts_with(&[0, 1, 2, 3, 4]) && open.len() <= 6 && !open.contains(&777), "{open:?}");
    let mut written = String::new();
    first.rewind().unwrap();
    first.read_to_string(&mut written).unwrap();
    assert_eq!(written, "a\nb\n");
}

#[test]
fn a_program_begins_in_its_group_and_session_with_its_limits() {
    let group = tempfile::tempdir().unwrap();
    fs::write(group.path().join("cgroup.procs"), "").unwrap();
    let limits = [(libc::RLIMIT_CORE, 0), (libc::RLIMIT_NOFILE, 64)];
    let script = "exec >&2; pwd; ulimit -c; ulimit -n; cut -d' ' -f6 /proc/self/stat";
    let (spawned, text) = told(script, |shell| shell.cgroup(group.path()).unwrap().limits(limits));
    assert_eq!(text, format!("/\n0\n64\n{}\n", spawned.pid));
    assert_eq!(fs::read_to_string(group.path().join("cgroup.procs")).unwrap(), "0");
}

#[test]
fn a_program_is_no_safer_from_the_kernel_than_others() {
    const SCORE: &str = "/proc/self/oom_score_adj";
    // Without the privilege a process cannot be where huskd is, below 0.
    let before = fs::read_to_string(SCORE).unwrap();
    if fs::write(SCORE, "-500").is_err() {
        fs::write(SCORE, "100").unwrap();
    }
    let (_, text) = told("cat /proc/self/oom_score_adj >&2", |shell| shell);
    let helped = helper("/bin/cat").arg(SCORE).output().unwrap();
    fs::write(SCORE, before).unwrap();
    assert_eq!(text, "0\n");
    assert_eq!(helped.stdout, b"0\n");
}

#[test]
fn a_namespace_of_its_own_has_nobody_to_signal() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: it needs root");
        return;
    }
    let mut victim = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
    let script = format!("echo $$ >&2; kill -9 {} 2>/dev/null && echo killed >&2", victim.id());
    let (spawned, text) = told(&script, Detached::own_pids);
    let ended = victim.try_wait().unwrap();
    victim.kill().unwrap();
    victim.wait().unwrap();
    assert_eq!((text.as_str(), ended), ("1\n", None));
    assert!(spawned.pid > 1);
}

#[test]
fn a_failure_names_its_step_and_leaves_nothing() {
    let missing = Detached::new(Path::new("/nonexistent/program")).unwrap().spawn().unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    // A group that takes no process.
    let group = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/full", group.path().join("cgroup.procs")).unwrap();
    let shell = || Detached::new(Path::new("/bin/sh")).unwrap();
    let refused = shell().cgroup(group.path()).unwrap().spawn().unwrap_err();
    assert!(refused.to_string().starts_with("join the control group: "), "{refused}");
    assert!(shell().cgroup(Path::new("/nonexistent")).is_err());
}

#[test]
fn an_idle_process_is_there_until_it_is_let_go() {
    let idle = idle().unwrap();
    let process = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", idle.pid()));
    let start = Instant::now();
    while process("comm").unwrap() != "husk-scope\n"
        || fs::read_dir(format!("/proc/{}/fd", idle.pid())).unwrap().count() != 1
    {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = idle.pid();
    drop(idle);
    wait_gone(pid);
}
