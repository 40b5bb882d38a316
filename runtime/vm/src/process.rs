//! The process of one `husk-vmm`. Its pidfd alone says whether the machine
//! lives: a request on the control socket can fail for many other reasons (too
//! many clients, no more descriptors, an answer that only a newer huskd
//! understands).

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use husk_vmm_api::{Request, socket};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Control, Error};

/// The stage of errors that come while the process is looked for.
const FIND: &str = "find the VMM's process";

/// A process that is known by a descriptor of its own, so that it is never taken
/// for another one that has got its number.
#[derive(Clone, Debug)]
pub struct Process(Arc<AsyncFd<OwnedFd>>);

impl Process {
    /// The process `pid`, which the caller knows to be the one that it means: it
    /// is a child that was not waited for yet.
    ///
    /// # Errors
    /// There is no such process, or there are no more descriptors.
    pub fn open(pid: u32) -> io::Result<Self> {
        Self::watch(pidfd(pid)?)
    }

    /// The process that answers on a control socket, which an earlier huskd may
    /// have started.
    ///
    /// # Errors
    /// When it does not answer: that says nothing of whether it lives.
    pub async fn of(control: &Control) -> Result<Self, Error> {
        let control = control.clone();
        let found = tokio::task::spawn_blocking(move || find(&control)).await;
        let pidfd = found.unwrap_or_else(|error| Err(failed(error)))?;
        Self::watch(pidfd).map_err(failed)
    }

    /// The process of this pidfd.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn watch(pidfd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` is the same open descriptor for as long as it lives.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
        Ok(Self(Arc::new(pidfd)))
    }

    /// Returns when the process has ended, and only then.
    pub async fn ended(&self) {
        match self.0.readable().await {
            Ok(mut guard) => guard.retain_ready(),
            // The runtime shuts down, and this task with it.
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

fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: pidfd_open takes two numbers and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = Errno::result(fd)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The credentials of the connection itself (`SO_PEERCRED`, `SO_PEERPIDFD`) are
/// of no use here: they are those of the process that called listen(2), an
/// earlier huskd. The kernel's word on who sent a packet is (unix(7),
/// `SCM_CREDENTIALS`).
///
/// A number that was told could belong to another process by the time that it is
/// opened. So the VMM is asked once more: it is alive and has this number after
/// that, as it had before, so the descriptor between the two is its own.
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

/// The process that answers a request, whatever it answers.
fn who_answers(socket: &OwnedFd) -> Result<u32, Error> {
    let refused = |errno| match errno {
        Errno::EAGAIN => failed("it does not answer"),
        Errno::EPIPE | Errno::ECONNRESET => failed("it hung up"),
        errno => failed(errno),
    };
    socket::send(socket.as_fd(), &Request::Info, &[]).map_err(|error| match error {
        socket::Error::Socket(errno) => refused(errno),
        error => failed(error),
    })?;
    // The rest of a longer packet is thrown away.
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
        return Err(failed("it hung up"));
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
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use nix::sys::socket::accept;

    use super::*;
    use crate::Vmm;
    use crate::control::tests::listener;

    /// Set in a process that stands in for a VMM: how many clients it hangs up on
    /// before it answers one.
    const STAND_IN: &str = "HUSK_TEST_STAND_IN_FOR_VMM";

    /// No test by itself: the others start this program again with it alone, and
    /// a listening socket as its standard input.
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
                // As a VMM would answer that has learned a new one.
                socket::send(client.as_fd(), &serde_json::json!({ "of_the_future": 1 }), &[]).unwrap();
            }
        }
    }

    /// Ends with the test, however that ends.
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
        // One that hangs up is not known, and may live.
        let unknown = Process::of(&control).await.unwrap_err();
        assert!(unknown.to_string().contains("hung up"), "{unknown}");
        let process = Process::of(&control).await.unwrap();
        assert!(!process.has_ended());
        child.0.kill().unwrap();
        tokio::time::timeout(Duration::from_secs(10), process.ended()).await.unwrap();
    }
}
