//! The virtio devices, each with a host around it, played by [`guest`](crate::guest).

pub mod balloon;
pub mod block;
pub mod fs;
pub mod net;
pub mod pmem;
pub mod rng;
pub mod vsock;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A pair of sockets that keep the bounds of messages, as the file server's and as a tap's are.
#[allow(clippy::unwrap_used)]
pub(crate) fn packets() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the kernel writes two descriptors to `fds`.
    let made = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) };
    assert_eq!(made, 0, "{}", io::Error::last_os_error());
    // SAFETY: both descriptors are new, and nobody else's.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

/// Sends a message if there is room for it.
pub(crate) fn send(socket: &OwnedFd, bytes: &[u8]) {
    // SAFETY: the kernel reads `bytes.len()` bytes of `bytes`.
    unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
}

/// Receives a message; `None` if there is none.
pub(crate) fn receive(socket: &OwnedFd, into: &mut [u8]) -> Option<usize> {
    // SAFETY: the kernel writes at most `into.len()` bytes to `into`.
    let length = unsafe { libc::recv(socket.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), 0) };
    usize::try_from(length).ok().filter(|length| *length > 0)
}
