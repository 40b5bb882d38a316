//! The control socket: accepts clients, receives their requests, and sends them
//! responses. It never waits for a client: one that does not read its responses
//! loses its connection.
//!
//! This module only moves messages. The event loop hands it the sockets'
//! events; [`crate::vmm`] then takes the requests from it and answers them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use husk_vmm_api::socket::{self, Error as SocketError};
use husk_vmm_api::words::say;
use husk_vmm_api::{Request, Response};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, SockFlag, accept4, shutdown};

/// Most clients at a time. Further ones are turned away.
const MAX_CLIENTS: usize = 8;

/// The name of a connection. Numbers of descriptors are used again, names are
/// not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientId(u64);

/// A request and the client that sent it.
pub struct Incoming {
    /// The client that gets the response.
    pub client: ClientId,
    /// The request with its descriptors, or the error in its packet.
    pub request: Result<(Request, Vec<OwnedFd>), String>,
}

struct Client {
    id: ClientId,
    socket: OwnedFd,
}

/// The listening socket and its clients.
pub struct ControlServer {
    listener: OwnedFd,
    clients: HashMap<RawFd, Client>,
    next_id: u64,
    inbox: VecDeque<Incoming>,
}

impl ControlServer {
    /// Serves a listening `SOCK_SEQPACKET` socket.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn new(listener: OwnedFd) -> io::Result<Self> {
        fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { listener, clients: HashMap::new(), next_id: 0, inbox: VecDeque::new() })
    }

    /// Takes the next request, if there is one.
    pub fn take_request(&mut self) -> Option<Incoming> {
        self.inbox.pop_front()
    }

    /// Whether any client is connected.
    #[must_use]
    pub fn has_clients(&self) -> bool {
        !self.clients.is_empty()
    }

    /// Sends `response`, if the client is still connected.
    pub fn reply(&self, client: ClientId, response: &Response) {
        let Some(client) = self.clients.values().find(|other| other.id == client) else { return };
        if socket::send(client.socket.as_fd(), response, &[]).is_err() {
            // The event loop then sees the end of the connection, and only the
            // loop can remove the socket from its set.
            let _ = shutdown(client.socket.as_raw_fd(), Shutdown::Both);
        }
    }

    fn accept(&mut self, ops: &mut EventOps) {
        loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = match accept4(self.listener.as_raw_fd(), flags) {
                // SAFETY: the kernel has just made this descriptor for us.
                Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(_) => return,
            };
            let fd = socket.as_raw_fd();
            if self.clients.len() < MAX_CLIENTS && ops.add(Events::new_raw(fd, EventSet::IN)).is_ok() {
                self.next_id += 1;
                self.clients.insert(fd, Client { id: ClientId(self.next_id), socket });
            }
        }
    }

    /// Receives one packet. If there are more, the socket stays readable.
    fn receive(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(client) = self.clients.get(&fd) else { return };
        let request = match socket::receive::<Request>(client.socket.as_fd()) {
            Ok(Some(request)) => Ok(request),
            Err(SocketError::Socket(Errno::EAGAIN)) => return,
            Err(error @ (SocketError::Json(_) | SocketError::TooLarge)) => Err(error.to_string()),
            Ok(None) | Err(SocketError::Socket(_)) => {
                let _ = ops.remove(Events::empty_raw(fd));
                self.clients.remove(&fd);
                return;
            }
        };
        self.inbox.push_back(Incoming { client: client.id, request });
    }
}

impl MutEventSubscriber for ControlServer {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.listener.as_raw_fd() {
            self.accept(ops);
        } else {
            self.receive(events.fd(), ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if ops.add(Events::new(&self.listener, EventSet::IN)).is_err() {
            say(format_args!("husk-vmm: failed to watch the control socket"));
        }
    }
}
