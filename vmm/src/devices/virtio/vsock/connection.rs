//! One stream between guest and host.
//!
//! A connection reacts to packets from the guest ([`Connection::receive`]) and
//! to events of its unix socket ([`Connection::host_event`]), and makes packets
//! for the guest when it is asked to ([`Connection::next_packet`]). After each
//! of these [`Connection::advance`] draws the conclusions.
//!
//! Each direction ends alone, and only after its last byte:
//!
//! | what ends                 | becomes                                      |
//! | ------------------------- | -------------------------------------------- |
//! | host sends no more        | `SHUTDOWN(send)` after the last data packet  |
//! | host takes no more        | `SHUTDOWN(receive)`, the buffer is dropped   |
//! | guest sends no more       | `shutdown(SHUT_WR)` when the buffer is empty |
//! | guest takes no more       | `shutdown(SHUT_RD)`                          |
//! | guest closes both         | the buffer is emptied, then RST              |
//! | RST from the guest        | the buffer is emptied, then the socket closed |

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, send};
use vmm_sys_util::epoll::EventSet;

use super::credit::Credit;
use super::packet::{
    HEADER_LEN, Header, MAX_PAYLOAD, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use crate::devices::virtio::buffers::Buffers;

/// How long the guest may take to answer a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection that carries nothing more waits for the guest to
/// acknowledge that.
const LINGER: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A host client has asked for the connection, and the guest has not
    /// answered.
    Requested,
    /// Both sides have accepted the connection.
    Open,
    /// The guest has finished with the connection. The host still gets the bytes
    /// in the buffer for as long as it has its end open, so that a slow reader
    /// loses nothing.
    Draining,
    /// The connection can be removed.
    Over,
}

/// Control packets that are still to be sent to the guest.
#[derive(Debug, Default)]
struct PendingControl {
    request: bool,
    response: bool,
    reset: bool,
    credit_request: bool,
    credit_update: bool,
}

/// A stream between guest and host, see the [module](self).
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    /// The host's end; `None` when neither direction needs it any more.
    socket: Option<UnixStream>,
    state: State,
    pending: PendingControl,
    credit: Credit,
    /// Bytes from the guest, for the socket.
    buffer: VecDeque<u8>,
    /// Shutdown flags from the guest.
    guest_shutdown: u32,
    /// Shutdown flags that were sent to the guest.
    shutdown_sent: u32,
    /// Whether the socket may have bytes, or the end of file.
    readable: bool,
    /// Whether the socket has given its last byte.
    host_sends_no_more: bool,
    /// Whether the socket takes no more bytes.
    host_takes_no_more: bool,
    /// Whether the socket was shut down because the guest sends no more.
    end_passed_on: bool,
    /// Whether the guest was asked for credit, and has not given any.
    asked_for_credit: bool,
    deadline: Option<Instant>,
}

impl Connection {
    fn new(ports: Ports, socket: UnixStream, state: State) -> Self {
        Self {
            ports,
            socket: Some(socket),
            state,
            pending: PendingControl::default(),
            credit: Credit::default(),
            buffer: VecDeque::new(),
            guest_shutdown: 0,
            shutdown_sent: 0,
            readable: false,
            host_sends_no_more: false,
            host_takes_no_more: false,
            end_passed_on: false,
            asked_for_credit: false,
            deadline: None,
        }
    }

    /// Makes a connection that a host client asks for.
    #[must_use]
    pub fn requested(ports: Ports, socket: UnixStream, now: Instant) -> Self {
        let mut connection = Self::new(ports, socket, State::Requested);
        connection.pending.request = true;
        connection.deadline = Some(now + REQUEST_TIMEOUT);
        connection
    }

    /// Makes a connection that the guest asked for; `socket` is connected.
    #[must_use]
    pub fn accepted(ports: Ports, socket: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(ports, socket, State::Open);
        connection.pending.response = true;
        connection.credit.learn(request);
        connection
    }

    /// The two ends of the connection.
    #[must_use]
    pub const fn ports(&self) -> Ports {
        self.ports
    }

    /// Whether the guest knows of the connection, so that its ports are taken.
    #[must_use]
    pub const fn is_known_to_guest(&self) -> bool {
        matches!(self.state, State::Requested | State::Open)
    }

    /// Whether the connection can be removed.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self.state, State::Over) && self.socket.is_none()
    }

    /// Whether [`expire`](Self::expire) must be called at some time.
    #[must_use]
    pub const fn has_deadline(&self) -> bool {
        self.deadline.is_some()
    }

    /// Whether the connection waits for the socket to take bytes again.
    #[must_use]
    pub fn wants_out(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// The host's end, if it is still open.
    #[must_use]
    pub fn socket(&self) -> Option<&UnixStream> {
        self.socket.as_ref()
    }

    /// Handles a packet from the guest. Its payload is `payload` from
    /// [`HEADER_LEN`] on, and has `header.len` bytes.
    pub fn receive(&mut self, header: &Header, payload: &Buffers<'_>) {
        self.credit.learn(header);
        if self.credit.window() > 0 {
            self.asked_for_credit = false;
        }
        match (header.op(), self.state) {
            (Some(Op::Reset), _) => self.detach(),
            (Some(Op::Response), State::Requested) => self.open(),
            (Some(Op::Data), State::Open) => self.receive_data(header.len.get(), payload),
            (Some(Op::Shutdown), State::Open) => self.receive_shutdown(header.flags.get()),
            (Some(Op::CreditRequest), State::Open) => self.pending.credit_update = true,
            (Some(Op::CreditUpdate), State::Open) => {}
            _ => self.abort(),
        }
    }

    /// Separates the connection from the guest, which knows nothing of it any
    /// more. Bytes that the guest has sent still go to the host.
    pub fn detach(&mut self) {
        self.pending = PendingControl::default();
        self.state = if self.buffer.is_empty() { State::Over } else { State::Draining };
        self.deadline = None;
    }

    /// Ends the connection at once, with an RST.
    pub fn abort(&mut self) {
        self.buffer = VecDeque::new();
        self.pending = PendingControl { reset: true, ..PendingControl::default() };
    }

    fn open(&mut self) {
        let line = format!("OK {}\n", self.ports.host);
        // The first bytes of a socket always fit.
        match self.socket.as_ref().map(|socket| send_bytes(socket, line.as_bytes())) {
            Some(Ok(len)) if len == line.len() => {
                self.state = State::Open;
                self.deadline = None;
            }
            _ => self.abort(),
        }
    }

    fn receive_data(&mut self, len: u32, payload: &Buffers<'_>) {
        let promised_not_to = self.guest_shutdown & SHUTDOWN_SEND != 0;
        if promised_not_to || self.credit.receive(len).is_err() {
            return self.abort();
        }
        let len = len as usize;
        let mut done = 0;
        if self.buffer.is_empty() && !self.host_takes_no_more {
            let sent =
                self.socket.as_ref().map(|socket| payload.io_vecs(HEADER_LEN, len).send(socket.as_fd()));
            done = self.sent(sent);
        }
        if self.host_takes_no_more {
            return self.credit.forward_all();
        }
        self.buffer.reserve(len - done);
        let mut chunk = [0; 4096];
        while done < len {
            let room = chunk.len().min(len - done);
            let copied = payload.read(HEADER_LEN + done, chunk.get_mut(..room).unwrap_or_default());
            self.buffer.extend(chunk.get(..copied).unwrap_or_default());
            done += copied;
            if copied == 0 {
                return self.abort();
            }
        }
    }

    fn receive_shutdown(&mut self, flags: u32) {
        // A shutdown cannot be revoked.
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0
            && let Some(socket) = &self.socket
        {
            // The call fails only if the peer has gone already.
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    /// Handles an event of the socket.
    pub fn host_event(&mut self, events: EventSet) {
        // Any other condition shows when the socket is read.
        self.readable |= events != EventSet::OUT;
        if events.contains(EventSet::HANG_UP) {
            if self.state == State::Requested {
                return self.abort();
            }
            self.host_takes_no_more();
        }
        if events.contains(EventSet::OUT) {
            self.flush();
        }
    }

    /// Writes as much of the buffer as the socket takes.
    fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            let sent = self.socket.as_ref().map(|socket| send_bytes(socket, front));
            let len = self.sent(sent);
            if len == 0 {
                break;
            }
            self.buffer.drain(..len);
        }
        if self.buffer.is_empty() {
            // An idle connection holds no memory.
            self.buffer = VecDeque::new();
        }
    }

    /// Returns the bytes that the socket took: none if it is full or broken.
    fn sent(&mut self, result: Option<io::Result<usize>>) -> usize {
        match result {
            Some(Ok(len)) => {
                self.credit.forward(len);
                len
            }
            Some(Err(error)) if is_transient(&error) => 0,
            Some(Err(_)) | None => {
                self.host_takes_no_more();
                0
            }
        }
    }

    fn host_takes_no_more(&mut self) {
        self.host_takes_no_more = true;
        self.buffer = VecDeque::new();
        self.credit.forward_all();
    }

    /// Moves the connection to its next state. Returns the socket when it is to
    /// be closed.
    pub fn advance(&mut self, now: Instant) -> Option<UnixStream> {
        if self.buffer.is_empty() {
            if self.state == State::Draining {
                self.state = State::Over;
            }
            if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.end_passed_on {
                self.end_passed_on = true;
                if let Some(socket) = &self.socket {
                    let _ = socket.shutdown(Shutdown::Write);
                }
            }
            if self.guest_shutdown == SHUTDOWN_BOTH && self.is_known_to_guest() {
                self.pending = PendingControl { reset: true, ..PendingControl::default() };
            }
        }
        if self.can_read() && self.credit.window() == 0 && !self.asked_for_credit {
            self.asked_for_credit = true;
            self.pending.credit_request = true;
        }
        let carries_nothing = self.host_sends_no_more && (self.host_takes_no_more || self.end_passed_on);
        if carries_nothing && self.state == State::Open && self.deadline.is_none() {
            self.deadline = Some(now + LINGER);
        }
        if carries_nothing || self.pending.reset || self.state == State::Over {
            self.socket.take()
        } else {
            None
        }
    }

    /// Ends the connection if its deadline has passed.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        if self.is_known_to_guest() {
            self.abort();
        }
    }

    /// Whether the socket may have bytes that the guest may want.
    fn can_read(&self) -> bool {
        self.state == State::Open
            && self.readable
            && !self.host_sends_no_more
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
            && self.socket.is_some()
    }

    fn shutdown_due(&self) -> u32 {
        let mut flags = 0;
        if self.host_takes_no_more {
            flags |= SHUTDOWN_RECEIVE;
        }
        if self.host_sends_no_more {
            flags |= SHUTDOWN_SEND;
        }
        flags & !self.shutdown_sent
    }

    /// Whether there may be a packet for the guest.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        if !self.is_known_to_guest() {
            return false;
        }
        if self.pending.reset || self.pending.request {
            return true;
        }
        self.state == State::Open
            && (self.pending.response
                || self.pending.credit_request
                || self.pending.credit_update
                || self.credit.update_is_due()
                || self.shutdown_due() != 0
                || (self.can_read() && self.credit.window() > 0))
    }

    /// The next packet for the guest, if there is one. Its payload is written
    /// into `room` from [`HEADER_LEN`] on.
    pub fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Header> {
        if !self.has_packet() {
            return None;
        }
        let mut header = if self.pending.reset {
            self.state = State::Over;
            self.ports.header(Op::Reset)
        } else if std::mem::take(&mut self.pending.request) {
            self.ports.header(Op::Request)
        } else if std::mem::take(&mut self.pending.response) {
            self.ports.header(Op::Response)
        } else if let Some(len) = self.read(room) {
            self.credit.send(len);
            Header { len: len.into(), ..self.ports.header(Op::Data) }
        } else if self.shutdown_due() != 0 {
            let flags = self.shutdown_due();
            self.shutdown_sent |= flags;
            Header { flags: flags.into(), ..self.ports.header(Op::Shutdown) }
        } else if std::mem::take(&mut self.pending.credit_request) {
            self.ports.header(Op::CreditRequest)
        } else if self.pending.credit_update || self.credit.update_is_due() {
            self.pending.credit_update = false;
            self.ports.header(Op::CreditUpdate)
        } else {
            return None;
        };
        self.credit.stamp(&mut header);
        Some(header)
    }

    /// Reads from the socket into the guest's memory.
    fn read(&mut self, room: &Buffers<'_>) -> Option<u32> {
        if !self.can_read() {
            return None;
        }
        let window = usize::try_from(self.credit.window()).unwrap_or(MAX_PAYLOAD);
        let io_vecs = room.io_vecs(HEADER_LEN, window.min(MAX_PAYLOAD));
        if io_vecs.is_empty() {
            return None;
        }
        match io_vecs.receive(self.socket.as_ref()?.as_fd()) {
            Ok(0) => self.host_sends_no_more = true,
            Ok(len) => return u32::try_from(len).ok(),
            Err(error) if is_transient(&error) => self.readable = false,
            Err(_) => {
                self.host_sends_no_more = true;
                self.host_takes_no_more();
            }
        }
        None
    }
}

fn send_bytes(socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    Ok(send(socket.as_raw_fd(), bytes, flags)?)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
