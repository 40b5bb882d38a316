//! Plugins that still run although whoever called them has gone.
//!
//! A huskd that dies leaves the plugin that it has just called running. Were DEL
//! run beside such an ADD, what the ADD does last would stay for ever: a lease,
//! a firewall rule. So nothing of the ADD may run any more when DEL begins.
//!
//! The processes of a call are found by their environment, which the programs that
//! a plugin starts (an IPAM plugin, `iptables`) inherit.

use std::fs;
use std::time::Duration;

use husk_base::blocking;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

/// The longest wait for the end of killed processes.
const DEADLINE: Duration = Duration::from_secs(10);

/// The pause between two looks.
const INTERVAL: Duration = Duration::from_millis(20);

/// Processes of an interrupted call do not end.
#[derive(Debug, thiserror::Error)]
#[error(
    "processes of a CNI plugin's interrupted call do not end although they were killed: {}; look what \
     they wait for in /proc/PID/stack",
    pids.iter().map(i32::to_string).collect::<Vec<_>>().join(", ")
)]
pub struct Unending {
    pids: Vec<i32>,
}

/// Ends every process of a plugin's call for a sandbox, and waits for their end.
///
/// # Errors
/// [`Unending`].
pub async fn end(sandbox_id: &str) -> Result<(), Unending> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let marker = format!("CNI_CONTAINERID={sandbox_id}");
        let pids = blocking(move || of_call(marker.as_bytes())).await;
        if pids.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Unending { pids });
        }
        for pid in pids {
            tracing::info!(pid, "killing what is left of an interrupted CNI plugin");
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => tracing::warn!(pid, error = %errno, "failed to kill a CNI plugin"),
            }
        }
        sleep(INTERVAL).await;
    }
}

/// Processes with this variable in their environment, and a command of CNI's. One
/// that has ended and waits for its parent has no environment any more.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn of_call(marker: &[u8]) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let is_of_call = |pid: &i32| {
        let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) else { return false };
        let mut variables = environment.split(|byte| *byte == 0);
        let marked = environment.split(|byte| *byte == 0).any(|variable| variable == marker);
        marked && variables.any(|variable| variable.starts_with(b"CNI_COMMAND="))
    };
    pids.filter(is_of_call).collect()
}
