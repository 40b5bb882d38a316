//! The driver's side of a virtqueue, for tests.
use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::Activation;
use super::interrupt::Interrupt;

/// Bytes of guest memory that [`memory`] makes.
pub const MEMORY_SIZE: usize = 64 << 20;

/// Guest memory of two adjacent regions. The first MiB is for virtqueues.
pub fn memory() -> GuestMemoryMmap {
    let half = MEMORY_SIZE / 2;
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]).unwrap()
}

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub address: u64,
    pub len: u32,
    pub writable: bool,
}

impl Part {
    pub fn readable(address: u64, len: u32) -> Self {
        Self { address, len, writable: false }
    }

    pub fn writable(address: u64, len: u32) -> Self {
        Self { address, len, writable: true }
    }
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A virtqueue as its driver sees it (virtio 1.2 §2.7).
pub struct DriverQueue {
    memory: GuestMemoryMmap,
    size: u16,
    base: u64,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    available: u16,
    used: u16,
    pub event: EventFd,
}

impl DriverQueue {
    /// Makes queue number `index` of a device, laid out in the first MiB.
    pub fn new(memory: &GuestMemoryMmap, index: u64, size: u16) -> Self {
        assert!(size <= 1024 && index < 16);
        Self {
            memory: memory.clone(),
            size,
            base: 0x1000 + index * 0x1_0000,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            available: 0,
            used: 0,
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    fn available_ring(&self) -> u64 {
        self.base + 0x8000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0xa000
    }

    /// The device's view of the queue.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.available_ring())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used_ring())).unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        queue
    }

    fn write_descriptor(&self, table: u64, index: u16, part: Part, flags: u16, next: u16) {
        let at = table + u64::from(index) * 16;
        self.memory.write_obj(part.address, GuestAddress(at)).unwrap();
        self.memory.write_obj(part.len, GuestAddress(at + 8)).unwrap();
        let flags = flags | if part.writable { WRITE } else { 0 };
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// The number of descriptors that are not in use.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain available; returns its head.
    pub fn add(&mut self, parts: &[Part]) -> u16 {
        assert!(!parts.is_empty());
        let indexes: Vec<u16> = parts.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (at, part) in parts.iter().enumerate() {
            let next = indexes.get(at + 1);
            let flags = if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(self.base, indexes[at], *part, flags, next.copied().unwrap_or(0));
        }
        let head = indexes[0];
        self.chains.insert(head, indexes);
        self.publish(head);
        head
    }

    /// Makes a chain available whose descriptors are in a table of their own.
    pub fn add_indirect(&mut self, table: u64, parts: &[Part]) -> u16 {
        for (index, part) in (0u16..).zip(parts) {
            let last = usize::from(index) + 1 == parts.len();
            self.write_descriptor(table, index, *part, if last { 0 } else { NEXT }, index + 1);
        }
        let head = self.free.pop().expect("a free descriptor");
        let len = u32::try_from(parts.len() * 16).unwrap();
        self.write_descriptor(self.base, head, Part::readable(table, len), INDIRECT, 0);
        self.chains.insert(head, vec![head]);
        self.publish(head);
        head
    }

    /// Writes any descriptor, also one that no honest driver would.
    pub fn raw_descriptor(&mut self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let part = Part { address, len, writable: false };
        self.write_descriptor(self.base, index % self.size, part, flags, next);
    }

    /// Puts a head into the available ring.
    pub fn publish(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + u64::from(self.available % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    /// Sets the available ring's index.
    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.memory.write_obj(index, GuestAddress(self.available_ring() + 2)).unwrap();
    }

    /// Sets the available ring's flags.
    pub fn set_available_flags(&mut self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(self.available_ring())).unwrap();
    }

    /// Sets `used_event`, from which on the driver wants an interrupt.
    pub fn set_used_event(&mut self, index: u16) {
        let at = self.available_ring() + 4 + u64::from(self.size) * 2;
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// The index from which on the device wants notifications.
    pub fn avail_event(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.used_ring() + 4 + u64::from(self.size) * 8)).unwrap()
    }

    /// Takes the next used chain: its head, and how many bytes the device
    /// wrote.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        if index == self.used {
            return None;
        }
        let slot = self.used_ring() + 4 + u64::from(self.used % self.size) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        self.free.extend(self.chains.remove(&head).unwrap_or_default());
        Some((head, len))
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.event.write(1).unwrap();
    }
}

/// The content of a queue as no honest driver would write it.
#[derive(Clone, Debug)]
pub struct StrangeRing {
    /// The descriptors: address, length, flags and next of each.
    descriptors: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    index: Option<u16>,
}

/// Rings of any content. Heads are below `heads`, which is more than the queue has descriptors.
pub fn strange_rings(heads: u16) -> impl Strategy<Value = StrangeRing> {
    (
        prop::collection::vec((any::<u64>(), any::<u32>(), 0..8_u16, 0..20_u16), 16),
        prop::collection::vec(0..heads, 0..12),
        prop_oneof![5 => Just(None), 1 => any::<u16>().prop_map(Some)],
    )
        .prop_map(|(descriptors, heads, index)| StrangeRing { descriptors, heads, index })
}

impl StrangeRing {
    /// Writes the content into `queue`, with buffers from `base` on, and notifies
    /// the device.
    pub fn write(&self, queue: &mut DriverQueue, base: u64) {
        for (number, &(address, len, flags, next)) in (0..).zip(&self.descriptors) {
            queue.raw_descriptor(number, base + address % MEMORY_SIZE as u64, len, flags, next);
        }
        self.heads.iter().for_each(|&head| queue.publish(head));
        if let Some(index) = self.index {
            queue.set_available_index(index);
        }
        queue.kick();
    }
}

/// Makes an activation with these queues; returns it with its interrupt line.
pub fn activation(memory: &GuestMemoryMmap, queues: &[&DriverQueue], features: u64) -> Activation {
    Activation {
        memory: memory.clone(),
        queues: queues.iter().map(|queue| queue.queue()).collect(),
        queue_events: queues.iter().map(|queue| queue.event.try_clone().unwrap()).collect(),
        interrupt: Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap())),
        features,
    }
}
