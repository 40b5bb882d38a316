//! The one place that waits for processes.
//!
//! Pid 1 is the parent of the processes that it starts and of every orphan.
//! runc leaves a container's init behind when it exits, so that process becomes
//! a child of the agent too, and may even have ended before the agent learns
//! its pid. Two rules close the gap. A child is started with the table locked,
//! so it cannot be reaped before it is registered. And while a [`Launch`] is
//! open, the statuses of processes that nobody waits for are kept, for
//! [`Launch::claim`].

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::unistd::Pid;
use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::guest::clock;

/// Most statuses that are kept for a claim. There are more than a launch's own
/// processes only if other containers fork wildly meanwhile.
const MAX_UNCLAIMED: usize = 4096;

/// The exit of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + the signal for a process that was ended by one.
    pub code: i32,
    /// The signal that ended the process.
    pub signal: Option<i32>,
    /// Wall-clock time, in nanoseconds since 1970.
    pub unix_nanos: i64,
    /// The same moment, for deadlines.
    pub instant: Instant,
}

/// Receives the exit of a process, in the same turn of the event loop in which
/// its pid becomes free for others.
pub type Exited = watch::Receiver<Option<Exit>>;

/// Waits for the end of a process.
pub async fn ended(mut exited: Exited) -> io::Result<Exit> {
    let exit = exited.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
    exit.ok_or_else(|| io::Error::other("its exit status was lost"))
}

/// A handle of the table of processes that are waited for.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    waiting: HashMap<i32, watch::Sender<Option<Exit>>>,
    launches: usize,
    unclaimed: HashMap<i32, Exit>,
}

impl Reaper {
    /// Starts reaping, as a task of the current runtime.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut children = signal(SignalKind::child())?;
        let task = reaper.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                task.reap();
            }
        });
        Ok(reaper)
    }

    /// Opens a launch: from now on, no exit is lost.
    pub fn launch(&self) -> Launch {
        self.table().launches += 1;
        Launch(self.clone())
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Each change of the table is complete by itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap(&self) {
        let mut table = self.table();
        while let Some(ended) = next_ended() {
            let Ended { pid, code, signal } = ended;
            let exit = Exit { code, signal, unix_nanos: clock::unix_nanos(), instant: Instant::now() };
            table.record(pid, exit);
        }
    }
}

/// The exit of a child, from waitpid(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    pid: i32,
    code: i32,
    signal: Option<i32>,
}

/// Waits for one child that has ended; `None` when there is none.
///
/// The status is read as a number, because a process may die of a real-time
/// signal, which nix cannot represent.
pub fn next_ended() -> Option<Ended> {
    loop {
        // This waits for any child: waitpid(None) of rustix means those of this
        // process group.
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                if let Some((code, signal)) = exit_code(status) {
                    return Some(Ended { pid: pid.as_raw_nonzero().get(), code, signal });
                }
            }
            Ok(None) | Err(rustix::io::Errno::CHILD) => return None,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "failed to wait for child processes");
                return None;
            }
        }
    }
}

/// The exit code of a status, and the signal that ended the process; `None` for
/// a process that has only stopped.
fn exit_code(status: WaitStatus) -> Option<(i32, Option<i32>)> {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Some((code, None)),
        (None, Some(signal)) => Some((128 + signal, Some(signal))),
        (None, None) => None,
    }
}

impl Table {
    fn record(&mut self, pid: i32, exit: Exit) {
        if let Some(waiter) = self.waiting.remove(&pid) {
            waiter.send_replace(Some(exit));
        } else if self.launches > 0 && self.unclaimed.len() < MAX_UNCLAIMED {
            self.unclaimed.insert(pid, exit);
        }
    }

    fn wait_for(&mut self, pid: i32) -> Exited {
        let (sender, receiver) = watch::channel(self.unclaimed.remove(&pid));
        if receiver.borrow().is_none() {
            self.waiting.insert(pid, sender);
        }
        receiver
    }
}

/// A time in which processes are started. While one is open, no exit is
/// forgotten.
pub struct Launch(Reaper);

impl Launch {
    /// Starts a child.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(Pid, Exited)> {
        self.spawn_with(|| {
            let child = command.spawn()?;
            // The handle is dropped, because the reaper waits for the process.
            i32::try_from(child.id()).map(Pid::from_raw).map_err(io::Error::other)
        })
    }

    /// Starts a child with `start`, which returns its pid.
    pub fn spawn_with(&self, start: impl FnOnce() -> io::Result<Pid>) -> io::Result<(Pid, Exited)> {
        let mut table = self.0.table();
        let pid = start()?;
        // A status under this pid is of an earlier process.
        table.unclaimed.remove(&pid.as_raw());
        let receiver = table.wait_for(pid.as_raw());
        Ok((pid, receiver))
    }

    /// Waits for a process that a child of this launch left behind, even if it
    /// has ended already.
    pub fn claim(&self, pid: Pid) -> Exited {
        self.0.table().wait_for(pid.as_raw())
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.launches -= 1;
        if table.launches == 0 {
            table.unclaimed = HashMap::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use super::*;

    fn exit(code: i32) -> Exit {
        Exit { code, signal: None, unix_nanos: 0, instant: Instant::now() }
    }

    #[tokio::test]
    async fn a_process_that_ended_before_it_was_claimed_is_found() {
        let reaper = Reaper::default();
        let launch = reaper.launch();
        reaper.table().record(42, exit(7));
        assert_eq!(ended(launch.claim(Pid::from_raw(42))).await.unwrap().code, 7);
    }

    #[tokio::test]
    async fn a_process_that_ends_later_is_told_to_its_waiter() {
        let reaper = Reaper::default();
        let receiver = reaper.launch().claim(Pid::from_raw(42));
        reaper.table().record(42, exit(9));
        assert_eq!(ended(receiver).await.unwrap().code, 9);
    }

    /// No other test may wait for children of this process.
    #[tokio::test]
    async fn a_process_that_dies_of_any_signal_has_128_and_its_number() {
        let reaper = Reaper::start().unwrap();
        for signal in [libc::SIGTERM, 34, 37, 40, 64] {
            let launch = reaper.launch();
            let script = format!("kill -{signal} $$");
            // Like a container's program, it is in a process group of its own.
            let mut command = Command::new("sh");
            let (_, child) = launch.spawn(command.args(["-c", &script]).process_group(0)).unwrap();
            let exit = tokio::time::timeout(std::time::Duration::from_secs(20), ended(child)).await;
            let exit = exit.unwrap_or_else(|_| panic!("signal {signal}: the exit was lost")).unwrap();
            assert_eq!((exit.code, exit.signal), (128 + signal, Some(signal)));
        }
    }

    #[test]
    fn statuses_are_kept_only_while_a_launch_is_open_and_within_bounds() {
        let reaper = Reaper::default();
        reaper.table().record(1, exit(0));
        assert!(reaper.table().unclaimed.is_empty());
        let launch = reaper.launch();
        let second = reaper.launch();
        for pid in 0..(MAX_UNCLAIMED as i32 + 10) {
            reaper.table().record(pid, exit(0));
        }
        assert_eq!(reaper.table().unclaimed.len(), MAX_UNCLAIMED);
        drop(launch);
        assert_eq!(reaper.table().unclaimed.len(), MAX_UNCLAIMED);
        drop(second);
        assert!(reaper.table().unclaimed.is_empty());
    }
}
