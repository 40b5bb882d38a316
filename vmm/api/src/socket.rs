//! Sends and receives packets of JSON with descriptors over a connected
//! `SOCK_SEQPACKET` socket.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{MAX_FDS, MAX_PACKET};

/// The reason that a message was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed. A time-out that is set on the socket is `EAGAIN`.
    #[error("control socket: {0}")]
    Socket(#[from] Errno),
    /// The packet is not the JSON of a message.
    #[error("control message: {0}")]
    Json(#[from] serde_json::Error),
    /// The packet has more than [`MAX_PACKET`] bytes or [`MAX_FDS`] descriptors.
    #[error("control message too large")]
    TooLarge,
}

/// Sends one message and the descriptors that it names.
///
/// # Errors
/// [`Error::TooLarge`], or an error of the socket.
pub fn send<M: Serialize>(socket: BorrowedFd<'_>, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
    let packet = serde_json::to_vec(message)?;
    if packet.len() > MAX_PACKET || fds.len() > MAX_FDS {
        return Err(Error::TooLarge);
    }
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let packet = [IoSlice::new(&packet)];
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &packet, control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// Receives one message with its descriptors; `None` when the peer has closed.
///
/// # Errors
/// An error of the socket, or [`Error::Json`] or [`Error::TooLarge`] for a packet
/// that is not a message; its descriptors are then closed.
pub fn receive<M: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
    Ok(receive_from(socket)?.map(|received| (received.message, received.fds)))
}

/// A message with its descriptors and its sender.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// The descriptors that came with the message.
    pub fds: Vec<OwnedFd>,
    /// The sender's process id, as the receiver sees it. The kernel tells it on
    /// a socket with `SO_PASSCRED`; a process in a PID namespace of its own does
    /// not know it.
    pub pid: Option<u32>,
}

/// Receives as [`receive`] does, and names the sender.
///
/// # Errors
/// The errors of [`receive`].
pub fn receive_from<M: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<Option<Received<M>>, Error> {
    let mut packet = vec![0u8; MAX_PACKET];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS], UnixCredentials);
    let mut parts = [IoSliceMut::new(&mut packet)];
    let (length, truncated, fds, pid) = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(received) => {
                let (mut fds, mut pid) = (Vec::new(), None);
                for message in received.cmsgs()? {
                    match message {
                        ControlMessageOwned::ScmRights(raw) => {
                            // SAFETY: the kernel has just made these descriptors for
                            // us, and nobody else knows them.
                            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                        }
                        ControlMessageOwned::ScmCredentials(sender) => {
                            pid = u32::try_from(sender.pid()).ok().filter(|pid| *pid != 0);
                        }
                        _ => {}
                    }
                }
                let truncated = received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
                break (received.bytes, truncated, fds, pid);
            }
        }
    };
    if truncated {
        return Err(Error::TooLarge);
    }
    if length == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(packet.get(..length).unwrap_or_default())?;
    Ok(Some(Received { message, fds, pid }))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::{Request, Response};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn a_request_arrives_with_its_descriptor() {
        let (here, there) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"rootfs").unwrap();
        let request = Request::AttachDisk { slot: "image-0".into(), file: 0, read_only: true };
        send(here.as_fd(), &request, &[file.as_fd()]).unwrap();
        let (got, fds) = receive::<Request>(there.as_fd()).unwrap().unwrap();
        assert_eq!(got, request);
        let mut twin = File::from(fds.into_iter().next().unwrap());
        twin.rewind().unwrap();
        let mut text = String::new();
        twin.read_to_string(&mut text).unwrap();
        assert_eq!(text, "rootfs");
    }

    #[test]
    fn a_sender_is_told_by_the_kernel() {
        let (here, there) = pair();
        nix::sys::socket::setsockopt(&here, nix::sys::socket::sockopt::PassCred, &true).unwrap();
        send(there.as_fd(), &Response::Ok, &[]).unwrap();
        let received = receive_from::<Response>(here.as_fd()).unwrap().unwrap();
        assert_eq!((received.message, received.pid), (Response::Ok, Some(std::process::id())));
    }

    #[test]
    fn a_closed_peer_is_an_end_and_not_an_error() {
        let (here, there) = pair();
        drop(there);
        assert!(receive::<Response>(here.as_fd()).unwrap().is_none());
    }

    #[test]
    fn foreign_packets_are_refused() {
        let (here, there) = pair();
        send(here.as_fd(), &"boo", &[]).unwrap();
        assert!(matches!(receive::<Request>(there.as_fd()), Err(Error::Json(_))));
        let large = "x".repeat(MAX_PACKET);
        assert!(matches!(send(here.as_fd(), &large, &[]), Err(Error::TooLarge)));
    }
}
