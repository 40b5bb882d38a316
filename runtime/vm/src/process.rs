//! The process of one `husk-vmm`. The process' pidfd alone says whether the VM
//! lives: a request on the control socket can fail for many other reasons (too
//! many clients, no more descriptors, an answer that only a newer huskd
//! understands).

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use husk_base::blocking;
use husk_spawn::pidfd;
use husk_vmm_api::{Request, socket};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Control, Error};

/// The stage of errors while the process is looked for.
const FIND: &str = "find the VMM's process";

/// A process that is known by a pidfd, so that it is never mistaken for another one that has
/// got its number.
#[derive(Clone, Debug)]
pub struct Process(Arc<AsyncFd<OwnedFd>>);

impl Process {
    /// The process `pid`. The caller must know that the number is still this process', because it
    /// is a child that was not waited for yet.
    ///
    /// # Errors
    /// There is no such process, or this one cannot have more descriptors.
    pub fn open(pid: u32) -> io::Result<Self> {
        Self::watch(pidfd(pid)?)
    }

    /// The process that answers on a control socket, which an earlier huskd may
    /// have started.
    ///
    /// # Errors
    /// The VMM does not answer. Whether it lives is unknown then.
    pub async fn of(control: &Control) -> Result<Self, Error> {
        let control = control.clone();
        let pidfd = blocking(move || find(&control)).await?;
        Self::watch(pidfd).map_err(failed)
    }

    /// The process of this pidfd.
    ///
    /// # Errors
    /// The descriptor cannot be watched.
    pub fn watch(pidfd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` is the same open descriptor for as long as it lives.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
        Ok(Self(Arc::new(pidfd)))
    }

    /// Returns when the process has ended, and only then.
    pub async fn ended(&self) {
        match self.0.readable().await {
            Ok(mut guard) => guard.retain_ready(),
            // The async runtime shuts down, and ends this task.
            Err(_) => std::future::pending().await,
        }
    }

    /// Whether the process has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.0.get_ref().as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }
}

fn failed(cause: impl std::fmt::Display) -> Error {
    Error::Control { stage: FIND, cause: cause.to_string() }
}

/// Finds the process that answers on a control socket.
///
/// The credentials of the connection itself (`SO_PEERCRED`, `SO_PEERPIDFD`) are
/// of no use here: they are those of the process that called listen(2), an
/// earlier huskd. Those that come with a packet are its sender's (unix(7),
/// `SCM_CREDENTIALS`).
///
/// The number could belong to another process by the time that it is
/// opened. So the VMM is asked once more: it lives and has this number after
/// that, as it had before, so the descriptor that was opened in between is its own.
fn find(control: &Control) -> Result<OwnedFd, Error> {
    let socket = control.connect(FIND, super::CONTROL_TIMEOUT)?;
    let socket = socket.ok_or_else(|| failed("the VMM has ended"))?;
    setsockopt(&socket, sockopt::PassCred, &true).map_err(failed)?;
    let pid = who_answers(&socket)?;
    let pidfd = pidfd(pid).map_err(failed)?;
    match who_answers(&socket)? {
        same if same == pid => Ok(pidfd),
        other => Err(failed(format!("process {pid} answered, and then process {other}"))),
    }
}

/// The id of the process that answers a request, whatever the answer is.
fn who_answers(socket: &OwnedFd) -> Result<u32, Error> {
    let refused = |errno| match errno {
        Errno::EAGAIN => failed("the VMM does not answer"),
        Errno::EPIPE | Errno::ECONNRESET => failed("the VMM hung up"),
        errno => failed(errno),
    };
    socket::send(socket.as_fd(), &Request::Info, &[]).map_err(|error| match error {
        socket::Error::Socket(errno) => refused(errno),
        error => failed(error),
    })?;
    // The kernel drops the rest of a longer packet.
    let mut packet = [0u8; 64];
    let mut control = nix::cmsg_space!(UnixCredentials);
    let mut parts = [IoSliceMut::new(&mut packet)];
    let answer = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(refused(errno)),
            Ok(answer) => break answer,
        }
    };
    if answer.bytes == 0 {
        return Err(failed("the VMM hung up"));
    }
    let mut messages = answer.cmsgs().map_err(failed)?;
    let pid = messages.find_map(|message| match message {
        ControlMessageOwned::ScmCredentials(who) => u32::try_from(who.pid()).ok().filter(|pid| *pid > 0),
        _ => None,
    });
    pid.ok_or_else(|| failed("the kernel does not say who answered"))
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use nix::sys::socket::accept;

    use super::*;
    use crate::Vmm;
    use crate::control::tests::listener;

    /// Set in a process that stands in for a VMM: how many clients it hangs up on
    /// before it answers one.
    const STAND_IN: &str = "HUSK_TEST_STAND_IN_FOR_VMM";

    /// This is no test by itself: the others start this program again with this alone, and
    /// with a listening socket as its standard input.
    #[test]
    fn stand_in_for_a_vmm() {
        let Ok(turned_away) = std::env::var(STAND_IN) else { return };
        let mut turned_away: usize = turned_away.parse().unwrap();
        loop {
            // SAFETY: the kernel has just made this descriptor for us.
            let client = unsafe { OwnedFd::from_raw_fd(accept(0).unwrap()) };
            if turned_away > 0 {
                turned_away -= 1;
                continue;
            }
            while let Ok(Some(_)) = socket::receive::<serde_json::Value>(client.as_fd()) {
                // A later VMM could answer so.
                socket::send(client.as_fd(), &serde_json::json!({ "of_the_future": 1 }), &[]).unwrap();
            }
        }
    }

    /// A process that ends with its test, however that ends.
    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn stand_in(socket: OwnedFd, turned_away: usize) -> Running {
        let mut program = Command::new(std::env::current_exe().unwrap());
        program.args(["process::tests::stand_in_for_a_vmm", "--exact", "--nocapture"]);
        program.env(STAND_IN, turned_away.to_string());
        program.stdin(Stdio::from(socket)).stdout(Stdio::null()).stderr(Stdio::null());
        Running(program.spawn().unwrap())
    }

    #[tokio::test]
    async fn a_vmm_whose_control_socket_fails_lives_for_as_long_as_its_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm.sock");
        let mut child = stand_in(listener(&path), usize::MAX);
        let process = Process::open(child.0.id()).unwrap();
        let control = Control::new(path);
        let vmm = Vmm::new(control, process.clone(), folder.path());
        let soon = Duration::from_millis(500);
        assert!(tokio::time::timeout(soon, vmm.ended()).await.is_err(), "it lives");
        assert!(!process.has_ended());
        child.0.kill().unwrap();
        let exit = tokio::time::timeout(soon * 20, vmm.ended()).await.unwrap();
        assert!(exit.is_none(), "it had no time for a record");
        assert!(process.has_ended());
    }

    #[tokio::test]
    async fn the_process_that_answers_is_found_and_not_the_one_that_made_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm.sock");
        let mut child = stand_in(listener(&path), 1);
        let control = Control::new(path);
        // A VMM that hangs up is not known, and may live.
        let unknown = Process::of(&control).await.unwrap_err();
        assert!(unknown.to_string().contains("hung up"), "{unknown}");
        let process = Process::of(&control).await.unwrap();
        assert!(!process.has_ended());
        child.0.kill().unwrap();
        tokio::time::timeout(Duration::from_secs(10), process.ended()).await.unwrap();
    }
}
