//! A guest that drives the device's real virtqueues, and runs its event loop.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromZeros, IntoBytes};

use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::test_utils::{DriverQueue, Part, activation, memory};
use crate::devices::virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, Op, STREAM};
use crate::devices::virtio::vsock::{HostPort, Vsock};

pub const CID: u64 = 42;
/// The port of the host that a guest can connect to.
pub const HOST_PORT: u32 = 80;
/// The size of the receive buffer that the guest announces.
pub const GUEST_BUFFER: u32 = 256 << 10;
const DEADLINE: Duration = Duration::from_secs(20);
const QUEUE_SIZE: u16 = 128;
const RX_BASE: u64 = 0x0200_0000;
const TX_BASE: u64 = 0x0100_0000;
const TX_STRIDE: u64 = 0x1_1000;

#[derive(Debug)]
pub struct Packet {
    pub header: Header,
    pub payload: Vec<u8>,
}

impl Packet {
    pub fn op(&self) -> Op {
        self.header.op().unwrap()
    }
}

pub struct Guest {
    pub device: Arc<Mutex<Vsock>>,
    events: EventManager<Arc<Mutex<Vsock>>>,
    pub memory: GuestMemoryMmap,
    pub rx: DriverQueue,
    pub tx: DriverQueue,
    pub event: DriverQueue,
    rx_buffers: HashMap<u16, u64>,
    rx_size: u32,
    pub features: u64,
    pub dir: TempDir,
    /// The host's end of the connection to [`HOST_PORT`].
    pub host_port: Option<UnixStream>,
}

impl Guest {
    /// Makes a guest with enough rx buffers.
    pub fn new() -> Self {
        let mut guest = Self::without_buffers();
        guest.post(64);
        guest
    }

    pub fn without_buffers() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("v")).unwrap();
        let (socket, host_port) = UnixStream::pair().unwrap();
        let vsock = Vsock::new(CID as u32, listener, Some(HostPort { port: HOST_PORT, socket })).unwrap();
        Self { host_port: Some(host_port), ..Self::with_device(vsock, dir) }
    }

    pub fn with_device(vsock: Vsock, dir: TempDir) -> Self {
        let memory = memory();
        let device = Arc::new(Mutex::new(vsock));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        let features = device.lock().unwrap().features();
        let queue = |index| DriverQueue::new(&memory, index, QUEUE_SIZE);
        let (rx, tx, event) = (queue(0), queue(1), queue(2));
        let rx_buffers = HashMap::new();
        let mut guest = Self {
            device,
            events,
            memory,
            rx,
            tx,
            event,
            rx_buffers,
            rx_size: 4096,
            features,
            dir,
            host_port: None,
        };
        guest.activate();
        guest
    }

    pub fn activate(&mut self) {
        let activation = activation(&self.memory, &[&self.rx, &self.tx, &self.event], self.features);
        self.lock().activate(activation).unwrap();
        self.run();
    }

    /// Resets the device and starts the driver anew, with the buffers it had.
    pub fn reset(&mut self) {
        self.lock().reset();
        let queue = |index| DriverQueue::new(&self.memory, index, QUEUE_SIZE);
        let queues = (queue(0), queue(1), queue(2));
        for ring in 0..3 {
            self.memory.write_slice(&[0; 0x1_0000], GuestAddress(0x1000 + ring * 0x1_0000)).unwrap();
        }
        (self.rx, self.tx, self.event) = queues;
        self.rx_buffers.clear();
    }

    pub fn lock(&self) -> MutexGuard<'_, Vsock> {
        self.device.lock().unwrap()
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// Runs the event loop until it has nothing to do.
    pub fn run(&mut self) {
        let start = Instant::now();
        while self.events.run_with_timeout(0).unwrap() > 0 {
            assert!(start.elapsed() < DEADLINE, "the event loop spins");
        }
    }

    pub fn wait(&mut self, milliseconds: i32) -> usize {
        self.events.run_with_timeout(milliseconds).unwrap()
    }

    /// Gives the device rx buffers.
    pub fn post(&mut self, count: usize) {
        for _ in 0..count {
            let address = RX_BASE + (self.rx_buffers.len() as u64) * u64::from(self.rx_size);
            let head = self.rx.add(&[Part::writable(address, self.rx_size)]);
            self.rx_buffers.insert(head, address);
        }
        self.rx.kick();
    }

    /// Takes the next packet that the device has given; its buffer is posted
    /// again.
    pub fn take(&mut self) -> Option<Packet> {
        let packet = self.take_and_keep_buffer()?;
        let (head, address) = packet.1;
        let again = self.rx.add(&[Part::writable(address, self.rx_size)]);
        self.rx_buffers.remove(&head);
        self.rx_buffers.insert(again, address);
        self.rx.kick();
        Some(packet.0)
    }

    pub fn take_and_keep_buffer(&mut self) -> Option<(Packet, (u16, u64))> {
        let (head, len) = self.rx.used()?;
        let address = self.rx_buffers[&head];
        let mut header = Header::new_zeroed();
        self.memory.read_slice(header.as_mut_bytes(), GuestAddress(address)).unwrap();
        assert_eq!(len as usize, HEADER_LEN + header.len.get() as usize);
        assert_eq!((header.src_cid.get(), header.dst_cid.get()), (HOST_CID, CID));
        let mut payload = vec![0; header.len.get() as usize];
        self.memory.read_slice(&mut payload, GuestAddress(address + HEADER_LEN as u64)).unwrap();
        Some((Packet { header, payload }, (head, address)))
    }

    /// Waits for the next packet.
    pub fn receive(&mut self) -> Packet {
        let start = Instant::now();
        loop {
            self.run();
            if let Some(packet) = self.take() {
                return packet;
            }
            assert!(start.elapsed() < DEADLINE, "no packet came");
            self.wait(10);
        }
    }

    /// Waits for the next packet, which must be this one.
    pub fn expect(&mut self, op: Op) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op(), op, "{packet:?}");
        packet
    }

    /// Checks that there is no packet.
    pub fn expect_silence(&mut self) {
        self.run();
        if let Some(packet) = self.take() {
            panic!("{packet:?}");
        }
    }

    /// Sends any packet.
    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        while self.tx.used().is_some() {}
        assert!(self.tx.free() >= 2);
        let address = TX_BASE + self.tx.free() as u64 * TX_STRIDE;
        self.memory.write_slice(header.as_bytes(), GuestAddress(address)).unwrap();
        self.memory.write_slice(payload, GuestAddress(address + 0x1000)).unwrap();
        let header = Part::readable(address, HEADER_LEN as u32);
        if payload.is_empty() {
            self.tx.add(&[header]);
        } else {
            self.tx.add(&[header, Part::readable(address + 0x1000, payload.len() as u32)]);
        }
        self.tx.kick();
    }

    /// Sends a well-formed packet.
    pub fn say(&mut self, host: u32, guest: u32, op: Op, flags: u32, payload: &[u8]) {
        self.send(
            &Header { flags: flags.into(), len: (payload.len() as u32).into(), ..header(host, guest, op) },
            payload,
        );
        self.run();
    }

    /// Connects a host client; returns the ports and the client's socket.
    pub fn connect_from_host(&mut self, guest: u32) -> (u32, UnixStream) {
        let mut client = UnixStream::connect(self.path()).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        client.set_write_timeout(Some(DEADLINE)).unwrap();
        client.write_all(format!("CONNECT {guest}\n").as_bytes()).unwrap();
        let request = self.expect(Op::Request);
        assert_eq!((request.header.dst_port.get(), request.header.kind.get()), (guest, STREAM));
        (request.header.src_port.get(), client)
    }

    /// Opens a connection.
    pub fn open(&mut self, guest: u32) -> (u32, UnixStream) {
        let (host, client) = self.connect_from_host(guest);
        self.say(host, guest, Op::Response, 0, &[]);
        assert_eq!(read_line(&client), format!("OK {host}"));
        (host, client)
    }
}

pub fn header(host: u32, guest: u32, op: Op) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID.into(),
        src_port: guest.into(),
        dst_port: host.into(),
        kind: STREAM.into(),
        op: (op as u16).into(),
        buf_alloc: GUEST_BUFFER.into(),
        ..Header::default()
    }
}

/// Reads a line, and nothing behind it.
pub fn read_line(mut stream: &UnixStream) -> String {
    use std::io::Read;
    let mut line = String::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).unwrap();
        if byte[0] == b'\n' {
            return line;
        }
        line.push(char::from(byte[0]));
    }
}
