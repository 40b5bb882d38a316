//! A process of a container, from its start until nobody asks for it any more.

pub mod fd;
pub mod pump;
pub mod reaper;
pub mod runc;
pub mod stdio;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use husk_proto::agent::stream::Kind;
use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::connection::Connection;
use crate::guest::cgroup::Cgroup;
use crate::process::fd::AsyncFile;
use crate::process::pump::{End, Input, OutputClient, OutputOwner};
use crate::process::reaper::{Exit, Exited};
use crate::process::stdio::Ends;

/// The end of a process whose output is delivered, or kept.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The process's exit.
    pub exit: Exit,
    /// Whether the kernel killed the process, or another one of its container
    /// while it ran, because memory ran out. A parent that survives its child's
    /// death may still exit with 0.
    pub oom_killed: bool,
    /// Whether the last of its output is kept, because nobody has taken it.
    pub output_kept: bool,
}

/// The role of a process in its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The container's first process, with which the container ends.
    Init,
    /// A process that an exec added.
    Exec,
}

/// A process and its standard streams.
pub struct Process {
    pid: Pid,
    role: Role,
    exited: Exited,
    ended: watch::Receiver<Option<Outcome>>,
    stdin: Option<mpsc::Sender<Input<Connection>>>,
    stdout: mpsc::Sender<OutputClient<Connection>>,
    stderr: Option<mpsc::Sender<OutputClient<Connection>>>,
    terminal: Option<OwnedFd>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Process {
    /// Takes charge of a process that runc has started.
    pub fn new(
        (pid, exited): (Pid, Exited),
        ends: Ends,
        stdin_once: bool,
        role: Role,
        cgroup: Arc<Cgroup>,
    ) -> io::Result<Self> {
        let (ended_sender, ended) = watch::channel(None);
        let mut tasks = Vec::new();
        let mut outputs = Vec::new();

        let terminal = ends.terminal.is_some();
        let mut open = |end: OwnedFd| -> io::Result<mpsc::Sender<OutputClient<Connection>>> {
            let (clients, receiver) = mpsc::channel(1);
            // The client that asked for an exec is the only one of its output.
            let owner = match (role, terminal) {
                (Role::Init, _) => OutputOwner::Container,
                (Role::Exec, false) => OutputOwner::Command,
                (Role::Exec, true) => OutputOwner::Session,
            };
            let (keep, kept) = watch::channel(false);
            let pump = pump::output(AsyncFile::reader(end)?, receiver, owner, exited.clone(), keep);
            let exited = exited.clone();
            outputs.push(kept);
            tasks.push(AbortOnDropHandle::new(tokio::spawn(async move {
                if pump.await == End::Abandoned && terminal {
                    // The kernel sends this signal too when a terminal goes.
                    let _ = send(pid, &exited, libc::SIGHUP);
                }
            })));
            Ok(clients)
        };
        let stdout = open(ends.stdout)?;
        let stderr = ends.stderr.map(&mut open).transpose()?;
        let stdin = match ends.stdin {
            Some(end) => {
                let (clients, receiver) = mpsc::channel(1);
                let pump = pump::input(AsyncFile::writer(end)?, receiver, stdin_once, exited.clone());
                tasks.push(AbortOnDropHandle::new(tokio::spawn(pump)));
                Some(clients)
            }
            None => None,
        };

        let oom_kills_before = cgroup.oom_kills();
        let exit = reaper::ended(exited.clone());
        tasks.push(AbortOnDropHandle::new(tokio::spawn(async move {
            let Ok(exit) = exit.await else { return };
            if role == Role::Init {
                // In a shared pid namespace the other processes would live on.
                cgroup.kill();
            }
            let oom_killed = cgroup.oom_kills() > oom_kills_before;
            let mut output_kept = false;
            for mut kept in outputs {
                // An error means that it was delivered.
                output_kept |= kept.wait_for(|kept| *kept).await.is_ok();
            }
            ended_sender.send_replace(Some(Outcome { exit, oom_killed, output_kept }));
        })));

        Ok(Self { pid, role, exited, ended, stdin, stdout, stderr, terminal: ends.terminal, _tasks: tasks })
    }

    /// The pid in the machine. It belongs to the process until it has exited.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether the process has ended. Its output may not be delivered yet.
    pub fn has_exited(&self) -> bool {
        self.exited.borrow().is_some()
    }

    /// The exit, which may be still to come.
    pub const fn exit(&self) -> &Exited {
        &self.exited
    }

    /// The moment of its end, if [`Self::ended`] would return at once.
    pub fn ended_at(&self) -> Option<Instant> {
        self.ended.borrow().as_ref().map(|outcome| outcome.exit.instant)
    }

    /// Waits for the exit, not for the output.
    pub async fn exited(&self) {
        let _ = self.exited.clone().wait_for(Option::is_some).await;
    }

    /// Waits until the process has ended and its output is delivered, or until
    /// the process is removed. `None` if it is removed before its end, or if
    /// somebody has not got all the output of a command: truncated output must
    /// not look like success. The future borrows nothing of the process.
    pub fn ended(&self) -> impl Future<Output = Option<Outcome>> + use<> {
        let mut ended = self.ended.clone();
        let exited = self.exited.clone();
        let role = self.role;
        async move {
            match ended.wait_for(Option::is_some).await {
                Ok(outcome) => *outcome,
                Err(_) if role == Role::Exec => None,
                Err(_) => exited.borrow().map(|exit| Outcome { exit, oom_killed: false, output_kept: false }),
            }
        }
    }

    /// Sends a signal to the process. Nothing happens if it has exited.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        send(self.pid, &self.exited, signal)
    }

    /// Sets the size of the terminal; false if there is none.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<bool> {
        let Some(terminal) = &self.terminal else { return Ok(false) };
        set_size(terminal, rows, columns)?;
        Ok(true)
    }

    /// Checks that a client may connect to this stream.
    pub fn check_stream(&self, kind: Kind) -> Result<(), &'static str> {
        match kind {
            Kind::Stdin => match &self.stdin {
                None => Err("the process was started without standard input"),
                Some(stdin) if stdin.is_closed() => Err("standard input is closed"),
                Some(_) => Ok(()),
            },
            Kind::Stdout => Ok(()),
            Kind::Stderr if self.stderr.is_none() => Err("with a terminal, stderr is part of stdout"),
            Kind::Stderr => Ok(()),
        }
    }

    /// Connects a client to a stream, in place of the present one. If the
    /// stream has ended, the connection is closed, as at the end of any stream.
    pub async fn connect(&self, kind: Kind, connection: Connection, early: Vec<u8>) {
        match kind {
            Kind::Stdin => {
                if let Some(stdin) = &self.stdin {
                    let _ = stdin.send(Input { connection, early }).await;
                }
            }
            Kind::Stdout | Kind::Stderr => self.connect_output(kind, connection, None).await,
        }
    }

    /// As [`Self::connect`], for an output whose client has all bytes before `from`, if it
    /// confirms what it has written.
    pub async fn connect_output(&self, kind: Kind, connection: Connection, from: Option<u64>) {
        let output = if kind == Kind::Stderr { self.stderr.as_ref() } else { Some(&self.stdout) };
        if let Some(output) = output {
            let _ = output.send(OutputClient { connection, from }).await;
        }
    }
}

/// Sets the size of a terminal. A client whose own terminal has no size sends 0
/// by 0, in which nothing can be drawn: that is ignored.
fn set_size(terminal: &OwnedFd, rows: u16, columns: u16) -> io::Result<()> {
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one winsize, which outlives the call.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    Ok(())
}

/// Sends a signal to a process that has not exited.
fn send(pid: Pid, exited: &Exited, signal: i32) -> io::Result<()> {
    // The reaper runs on this thread, so while the exit is not recorded no
    // other process can have the pid.
    if exited.borrow().is_some() {
        return Ok(());
    }
    // SAFETY: kill has no memory effects. nix has no real-time signals.
    match Errno::result(unsafe { libc::kill(pid.as_raw(), signal) }) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::pty::openpty;
    use nix::unistd::pipe;

    use super::*;

    fn size_of(terminal: &OwnedFd) -> (u16, u16) {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the kernel writes one winsize, which outlives the call.
        let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
        assert_eq!(done, 0);
        (size.ws_row, size.ws_col)
    }

    #[test]
    fn a_size_of_nothing_leaves_a_terminal_as_it_is() {
        let terminal = openpty(None, None).unwrap().master;
        set_size(&terminal, 24, 80).unwrap();
        for (rows, columns) in [(0, 0), (0, 100), (50, 0)] {
            set_size(&terminal, rows, columns).unwrap();
            assert_eq!(size_of(&terminal), (24, 80), "{rows} by {columns}");
        }
        set_size(&terminal, 50, 132).unwrap();
        assert_eq!(size_of(&terminal), (50, 132));
    }

    /// The outcome of a container that exits with 0 after `kills` of its
    /// processes were killed because memory ran out; one was killed before it
    /// started.
    async fn outcome(kills: u32) -> Outcome {
        let group = tempfile::tempdir().unwrap();
        let events = |kills: u32| {
            fs::write(group.path().join("memory.events"), format!("oom 9\noom_kill {kills}\n")).unwrap();
        };
        events(1);
        let ((stdout, _), (stderr, _)) = (pipe().unwrap(), pipe().unwrap());
        let ends = Ends { stdin: None, stdout, stderr: Some(stderr), terminal: None };
        let (exit, exited) = watch::channel(None);
        let cgroup = Arc::new(Cgroup::at(group.path()));
        let process =
            Process::new((Pid::from_raw(i32::MAX), exited), ends, false, Role::Init, cgroup).unwrap();
        events(1 + kills);
        exit.send_replace(Some(Exit { code: 0, signal: None, unix_nanos: 0, instant: Instant::now() }));
        process.ended().await.unwrap()
    }

    #[tokio::test]
    async fn a_child_that_was_killed_for_want_of_memory_is_told_though_its_parent_ends_well() {
        let killed = outcome(1).await;
        assert_eq!((killed.exit.code, killed.oom_killed), (0, true));
        let unharmed = outcome(0).await;
        assert_eq!((unharmed.exit.code, unharmed.oom_killed), (0, false));
    }
}
