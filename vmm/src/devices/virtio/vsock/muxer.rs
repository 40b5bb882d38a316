//! All connections of the device, and the host's side of making them.
//!
//! The muxer knows neither virtqueues nor the event loop. It takes packets from
//! the guest ([`Muxer::receive`]), returns packets for it
//! ([`Muxer::next_packet`], one per connection in turn), and returns the
//! [`Change`]s to the descriptors that the event loop watches.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::connection::Connection;
use super::handshake::{Handshake, Progress};
use super::packet::{HEADER_LEN, HOST_CID, Header, Op, Ports, STREAM};
use super::slab::Slab;
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::watch::FIRST_TOKEN;

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 1024;
/// Most host clients that have not finished their first line.
pub const MAX_HANDSHAKES: usize = 64;
/// Most RSTs for packets of no connection that wait for the guest. While there
/// are so many, no packets are taken from it.
pub const MAX_RESETS: usize = 256;

/// How long a host client may take for its first line.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Ports that stand for host clients. They do not collide with the guest's own
/// ports.
pub const HOST_PORTS: RangeInclusive<u32> = 1 << 30..=(1 << 31) - 1;

/// The token of the listener in the event loop.
pub const LISTENER: u32 = FIRST_TOKEN;
/// The token of the device's timer.
pub const TIMER: u32 = FIRST_TOKEN + 1;
/// Token of the timer of the device's limit.
pub const LIMIT_TIMER: u32 = FIRST_TOKEN + 2;
const FIRST_HANDSHAKE: u32 = 0x1000;
const FIRST_CONNECTION: u32 = 0x2000;

/// A port of the host that the guest can connect to, and the socket that the
/// connection leads to. There can be only one connection to it.
#[derive(Debug)]
pub struct HostPort {
    /// The number of the port.
    pub port: u32,
    /// A connected socket.
    pub socket: UnixStream,
}

/// A change to the descriptors that the event loop watches.
#[derive(Debug)]
pub enum Change {
    /// Watch a descriptor.
    Add(RawFd, u32, EventSet),
    /// Watch a descriptor for other events.
    Modify(RawFd, u32, EventSet),
    /// Stop watching a descriptor.
    Remove(RawFd),
    /// Stop watching a descriptor, and close it.
    Close(UnixStream),
}

#[derive(Debug)]
struct Slot {
    connection: Connection,
    /// Whether the connection is in `Muxer::ready`.
    queued: bool,
    watches_out: bool,
}

/// All connections of a device, see the [module](self).
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    listener: UnixListener,
    /// The port of the host that the guest can connect to, until it has done
    /// so.
    host_port: Option<HostPort>,
    /// Whether host clients are accepted, because a driver is there.
    open: bool,
    listening: bool,
    /// Whether `accept` failed; it is tried again at the next tick.
    accept_failed: bool,
    handshakes: Slab<Handshake>,
    connections: Slab<Slot>,
    /// The connections that the guest knows.
    by_ports: HashMap<Ports, usize>,
    /// The connections that have packets, in their turn.
    ready: VecDeque<usize>,
    /// RSTs for packets of no connection: ports and socket type.
    resets: VecDeque<(Ports, u16)>,
    next_host_port: u32,
    /// Whether anything may have a deadline.
    ticking: bool,
    changes: Vec<Change>,
}

impl Muxer {
    /// Makes a muxer. Host clients connect to `listener`; the guest can connect
    /// to `host_port`.
    ///
    /// # Errors
    /// A socket cannot be made non-blocking.
    pub fn new(guest_cid: u32, listener: UnixListener, host_port: Option<HostPort>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        if let Some(HostPort { socket, .. }) = &host_port {
            socket.set_nonblocking(true)?;
        }
        Ok(Self {
            guest_cid: guest_cid.into(),
            listener,
            host_port,
            open: false,
            listening: false,
            accept_failed: false,
            handshakes: Slab::new(MAX_HANDSHAKES),
            connections: Slab::new(MAX_CONNECTIONS),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: *HOST_PORTS.start(),
            ticking: false,
            changes: Vec::new(),
        })
    }

    /// The guest's context id.
    #[must_use]
    pub const fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// The port of the next connection from the host, if it is free.
    #[must_use]
    pub const fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// Continues with that port, one of [`HOST_PORTS`].
    pub const fn set_next_host_port(&mut self, port: u32) {
        self.next_host_port = port;
    }

    /// Takes the changes for the event loop since the last call.
    pub fn take_changes(&mut self) -> Vec<Change> {
        let wanted = self.open && !self.accept_failed && !self.handshakes.is_full();
        if wanted != self.listening {
            self.listening = wanted;
            let fd = self.listener.as_raw_fd();
            self.changes.push(if wanted {
                Change::Add(fd, LISTENER, EventSet::IN)
            } else {
                Change::Remove(fd)
            });
        }
        std::mem::take(&mut self.changes)
    }

    /// Notes that a driver has come, or has gone. No connection survives that,
    /// but bytes that the guest has sent still reach the host.
    pub fn set_open(&mut self, open: bool) {
        self.open = open;
        self.resets.clear();
        for name in self.handshakes.names() {
            self.drop_handshake(name);
        }
        let now = Instant::now();
        for name in self.connections.names() {
            if let Some(slot) = self.connections.get_mut(name) {
                slot.connection.detach();
            }
            self.settle(name, now);
        }
    }

    /// Whether [`tick`](Self::tick) must be called.
    #[must_use]
    pub const fn needs_tick(&self) -> bool {
        self.ticking
    }

    /// Checks the deadlines.
    pub fn tick(&mut self, now: Instant) {
        self.accept_failed = false;
        self.ticking = self.handshakes.len() > 0;
        for name in self.handshakes.names() {
            if self.handshakes.get_mut(name).is_some_and(|handshake| handshake.deadline <= now) {
                self.drop_handshake(name);
            }
        }
        for name in self.connections.names() {
            if let Some(slot) = self.connections.get_mut(name) {
                slot.connection.expire(now);
            }
            self.settle(name, now);
        }
    }

    /// Handles an event of the descriptor with this token.
    pub fn host_event(&mut self, token: u32, events: EventSet) {
        let now = Instant::now();
        if token == LISTENER {
            self.accept(now);
        } else if token >= FIRST_CONNECTION {
            let name = (token - FIRST_CONNECTION) as usize;
            if let Some(slot) = self.connections.get_mut(name) {
                slot.connection.host_event(events);
            }
            self.settle(name, now);
        } else if token >= FIRST_HANDSHAKE {
            self.read_handshake((token - FIRST_HANDSHAKE) as usize, now);
        }
    }

    fn accept(&mut self, now: Instant) {
        while !self.handshakes.is_full() {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(_) => {
                    // Most likely there are too many open files.
                    self.accept_failed = true;
                    self.ticking = true;
                    return;
                }
            };
            let fd = socket.as_raw_fd();
            if let Ok(name) = self.handshakes.insert(Handshake::new(socket, now + HANDSHAKE_TIMEOUT)) {
                self.changes.push(Change::Add(fd, token(FIRST_HANDSHAKE, name), EventSet::IN));
                self.ticking = true;
            }
        }
    }

    fn read_handshake(&mut self, name: usize, now: Instant) {
        let Some(handshake) = self.handshakes.get_mut(name) else { return };
        match handshake.read() {
            Progress::Incomplete => {}
            Progress::Bad => self.drop_handshake(name),
            Progress::Connect(_) if self.connections.is_full() => self.drop_handshake(name),
            Progress::Connect(guest) => {
                let Some(handshake) = self.handshakes.remove(name) else { return };
                let ports = Ports { host: self.free_host_port(guest), guest };
                let fd = handshake.socket.as_raw_fd();
                let connection = Connection::requested(ports, handshake.socket, now);
                if let Some(name) = self.insert(connection) {
                    self.changes.push(Change::Modify(fd, token(FIRST_CONNECTION, name), INTEREST));
                    self.settle(name, now);
                }
            }
        }
    }

    fn drop_handshake(&mut self, name: usize) {
        if let Some(handshake) = self.handshakes.remove(name) {
            self.changes.push(Change::Close(handshake.socket));
        }
    }

    /// A free port of the host. There are far more ports than connections, so
    /// one is free.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = if host == *HOST_PORTS.end() { *HOST_PORTS.start() } else { host + 1 };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn insert(&mut self, connection: Connection) -> Option<usize> {
        let ports = connection.ports();
        let slot = Slot { connection, queued: false, watches_out: false };
        let name = self.connections.insert(slot).ok()?;
        self.by_ports.insert(ports, name);
        Some(name)
    }

    /// Whether the guest may send another packet.
    #[must_use]
    pub fn can_receive(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Handles a packet from the guest: a header, and all bytes of its chain.
    pub fn receive(&mut self, header: &Header, chain: &Buffers<'_>) {
        if header.src_cid.get() != self.guest_cid || header.dst_cid.get() != HOST_CID {
            // The sender's address is false, or the receiver is not here: there
            // is nobody to answer.
            return;
        }
        let ports = Ports { host: header.dst_port.get(), guest: header.src_port.get() };
        let kind = header.kind.get();
        if kind != STREAM {
            return self.refuse(header, ports, kind);
        }
        let now = Instant::now();
        if let Some(&name) = self.by_ports.get(&ports) {
            if let Some(slot) = self.connections.get_mut(name) {
                if header.len.get() as usize > chain.len().saturating_sub(HEADER_LEN) {
                    slot.connection.abort();
                } else {
                    slot.connection.receive(header, chain);
                }
            }
            return self.settle(name, now);
        }
        if header.op() != Some(Op::Request) || self.connections.is_full() {
            return self.refuse(header, ports, kind);
        }
        match self.host_port.take_if(|host| host.port == ports.host) {
            Some(HostPort { socket, .. }) => {
                let fd = socket.as_raw_fd();
                if let Some(name) = self.insert(Connection::accepted(ports, socket, header)) {
                    self.changes.push(Change::Add(fd, token(FIRST_CONNECTION, name), INTEREST));
                    self.settle(name, now);
                }
            }
            None => self.refuse(header, ports, kind),
        }
    }

    fn refuse(&mut self, header: &Header, ports: Ports, kind: u16) {
        // An RST is never answered, or two sides could continue for ever.
        if header.op() != Some(Op::Reset) && self.can_receive() {
            self.resets.push_back((ports, kind));
        }
    }

    /// Whether there may be packets for the guest.
    #[must_use]
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest. Its payload, if any, is written into
    /// `room` behind the place for the header.
    pub fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Header> {
        let mut header = self.next_reset().or_else(|| self.next_of_connections(room))?;
        header.src_cid = HOST_CID.into();
        header.dst_cid = self.guest_cid.into();
        Some(header)
    }

    fn next_reset(&mut self) -> Option<Header> {
        let (ports, kind) = self.resets.pop_front()?;
        Some(Header { kind: kind.into(), ..ports.header(Op::Reset) })
    }

    fn next_of_connections(&mut self, room: &Buffers<'_>) -> Option<Header> {
        let now = Instant::now();
        // Each connection gets one turn; one that has more goes to the end.
        for _ in 0..self.ready.len() {
            let name = self.ready.pop_front()?;
            let Some(slot) = self.connections.get_mut(name) else { continue };
            slot.queued = false;
            let header = slot.connection.next_packet(room);
            self.settle(name, now);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// Updates the lists after a change of a connection.
    fn settle(&mut self, name: usize, now: Instant) {
        let Some(slot) = self.connections.get_mut(name) else { return };
        let connection = &mut slot.connection;
        if let Some(socket) = connection.advance(now) {
            self.changes.push(Change::Close(socket));
        }
        if let Some(socket) = connection.socket()
            && connection.wants_out() != slot.watches_out
        {
            slot.watches_out = !slot.watches_out;
            let interest = if slot.watches_out { INTEREST | EventSet::OUT } else { INTEREST };
            let token = token(FIRST_CONNECTION, name);
            self.changes.push(Change::Modify(socket.as_raw_fd(), token, interest));
        }
        if !connection.is_known_to_guest() && self.by_ports.get(&connection.ports()) == Some(&name) {
            self.by_ports.remove(&connection.ports());
        }
        if connection.is_over() {
            if slot.queued {
                self.ready.retain(|&other| other != name);
            }
            self.connections.remove(name);
            return;
        }
        self.ticking |= connection.has_deadline();
        if connection.has_packet() && !slot.queued {
            slot.queued = true;
            self.ready.push_back(name);
        }
    }

    /// The number of connections, including those that only drain.
    #[must_use]
    pub const fn connections(&self) -> usize {
        self.connections.len()
    }
}

/// The events that a socket is watched for, by edges: bytes that wait for the
/// guest to make room must not wake the loop again and again. So everything is
/// read until there is no more, see [`Connection::next_packet`].
const INTEREST: EventSet = EventSet::IN.union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);

fn token(first: u32, name: usize) -> u32 {
    // Names are smaller than MAX_CONNECTIONS.
    first + u32::try_from(name).unwrap_or_default()
}
