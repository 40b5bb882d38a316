//! A guest that drives the device's real virtqueues, and runs its event loop.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::host::tap;
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::net::tap::HEADER_LEN;
use crate::devices::virtio::test_utils::{DriverQueue, Part, activation, memory};

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const QUEUE_SIZE: u16 = 256;
const DEADLINE: Duration = Duration::from_secs(20);
const RX_BASE: u64 = 0x0200_0000;
const TX_BASE: u64 = 0x0100_0000;

pub struct Guest {
    device: Arc<Mutex<Net>>,
    events: EventManager<Arc<Mutex<Net>>>,
    memory: GuestMemoryMmap,
    pub rx: DriverQueue,
    pub tx: DriverQueue,
    /// The address of each rx buffer.
    buffers: HashMap<u16, u64>,
    posted: u64,
    completed: usize,
    pub features: u64,
    interrupt: Arc<Interrupt>,
}

impl Guest {
    /// Makes a guest whose driver accepts the features that the mask allows.
    pub fn new(name: &str, features: u64) -> Self {
        Self::with(name, features, |_| {})
    }

    /// Makes a guest as [`Self::new`] does, with a device that is changed
    /// before the event loop knows it.
    pub fn with(name: &str, features: u64, change: impl FnOnce(&mut Net)) -> Self {
        let memory = memory();
        let mut net = Net::new(tap(name).unwrap(), MAC, 1500).unwrap();
        change(&mut net);
        let device = Arc::new(Mutex::new(net));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        let queue = |index| DriverQueue::new(&memory, index, QUEUE_SIZE);
        let (rx, tx) = (queue(0), queue(1));
        let activation = activation(&memory, &[&rx, &tx], 0);
        let interrupt = activation.interrupt;
        let buffers = HashMap::new();
        let mut guest =
            Self { device, events, memory, rx, tx, buffers, posted: 0, completed: 0, features, interrupt };
        guest.activate();
        guest
    }

    pub fn activate(&mut self) {
        let features = self.lock().features() & self.features;
        let activation = activation(&self.memory, &[&self.rx, &self.tx], features);
        self.interrupt = activation.interrupt.clone();
        self.lock().activate(activation).unwrap();
        self.run();
    }

    pub fn reset(&mut self) {
        self.lock().reset();
        self.memory.write_slice(&[0; 0x2_0000], GuestAddress(0x1000)).unwrap();
        let queue = |index| DriverQueue::new(&self.memory, index, QUEUE_SIZE);
        (self.rx, self.tx) = (queue(0), queue(1));
        self.buffers.clear();
        self.posted = 0;
    }

    pub fn lock(&self) -> MutexGuard<'_, Net> {
        self.device.lock().unwrap()
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

    /// The number of interrupts since the last call.
    pub fn interrupts(&self) -> u64 {
        self.interrupt.line().read().unwrap_or(0)
    }

    /// Gives the device rx buffers.
    pub fn post(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let address = RX_BASE + self.posted % 2048 * 8192;
            self.posted += 1;
            let head = self.rx.add(&[Part::writable(address, len)]);
            self.buffers.insert(head, address);
        }
        self.rx.kick();
    }

    /// Sends a packet, cut into pieces of these lengths and the rest.
    pub fn send(&mut self, header: &[u8; HEADER_LEN], frame: &[u8], cuts: &[usize]) {
        self.sent();
        let packet = [&header[..], frame].concat();
        self.memory.write_slice(&packet, GuestAddress(TX_BASE)).unwrap();
        let mut parts = Vec::new();
        let mut at = 0;
        for cut in cuts.iter().copied().chain([packet.len()]) {
            let len = cut.min(packet.len() - at);
            if len > 0 {
                parts.push(Part::readable(TX_BASE + at as u64, len as u32));
            }
            at += len;
        }
        self.tx.add(&parts);
        self.tx.kick();
        self.run();
    }

    /// How many packets the device has taken so far.
    pub fn sent(&mut self) -> usize {
        while self.tx.used().is_some() {
            self.completed += 1;
        }
        self.completed
    }

    /// Takes a packet that is there already: its header and the frame.
    pub fn take(&mut self) -> Option<([u8; HEADER_LEN], Vec<u8>)> {
        let (head, len) = self.rx.used()?;
        let mut packet = self.read(head, len);
        let count = u16::from_le_bytes([packet[10], packet[11]]);
        for _ in 1..count {
            // All chains of the packet are there when the first one is.
            let (head, len) = self.rx.used().expect("the whole packet");
            let part = self.read(head, len);
            packet.extend(part);
        }
        let frame = packet.split_off(HEADER_LEN);
        Some((packet.try_into().unwrap(), frame))
    }

    fn read(&mut self, head: u16, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let address = self.buffers.remove(&head).expect("a posted buffer");
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Waits for the next packet.
    pub fn receive(&mut self) -> ([u8; HEADER_LEN], Vec<u8>) {
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

    pub fn expect_silence(&mut self) {
        self.run();
        assert!(self.take().is_none());
    }
}
