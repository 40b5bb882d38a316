//! A hostile guest: an input is a program of register writes, descriptors, memory contents and notifications, in
//! any order, for one device behind its registers.
//!
//! Three things are held against a device besides that it neither panics nor hangs: it never returns more chains than
//! it was given; and as long as the program was an honest driver's, what it returns is what it was given, and it
//! writes to no byte besides those that a request has for its answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};
use husk_vmm::devices::bus::BusDevice;
use husk_vmm::devices::virtio::device::VirtioDevice;
use husk_vmm::devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use husk_vmm::machine::Subscriber;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::{Input, Output};

/// Bytes of guest memory, in two adjacent regions.
pub const MEMORY: u64 = 512 << 10;
/// Most operations of a program.
const MAX_STEPS: usize = 300;
/// Most rounds of the event loop for one notification.
const MAX_ROUNDS: usize = 40;
/// Bytes behind each buffer of an honest driver that nobody may write.
const GUARD: [u8; 16] = *b"husk-fuzz-guard!";
/// Where an honest driver's buffers begin.
const BUFFERS: u64 = 0x1_0000;
/// More chains at once than any device has descriptors for.
const QUEUE_SIZE: u16 = 256;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A device, and the host around it.
pub trait World {
    /// The device type.
    type Device: VirtioDevice + 'static;

    /// Guest memory changes only where a request has room for an answer. A balloon gives away pages with whatever is in
    /// them.
    const KEEPS_MEMORY: bool = true;

    /// The device.
    fn device(&self) -> Arc<Mutex<Self::Device>>;

    /// Does what the host's side does, as the input says.
    fn host(&mut self, input: &mut Input);

    /// Called after the event loop had its turn.
    fn settle(&mut self) {}

    /// Delivers the driver's notification of a queue in another way than through its eventfd.
    fn notify(&mut self) -> bool {
        false
    }
}

/// The operations of a program, by the number that encodes each.
mod op {
    pub const COUNT: u8 = 13;
    pub const WRITE_REGISTER: u8 = 0;
    pub const READ_REGISTER: u8 = 1;
    pub const NEGOTIATE: u8 = 2;
    pub const RESET: u8 = 3;
    pub const REQUEST: u8 = 4;
    pub const KICK: u8 = 5;
    pub const HOST: u8 = 6;
    pub const DESCRIPTOR: u8 = 7;
    pub const PUBLISH: u8 = 8;
    pub const AVAILABLE: u8 = 9;
    pub const MEMORY: u8 = 10;
    pub const WISHES: u8 = 11;
    pub const SAVE: u8 = 12;
}

const fn table(queue: u64) -> u64 {
    0x1000 + queue * 0x4000
}

const fn available_ring(queue: u64) -> u64 {
    table(queue) + 0x2000
}

const fn used_ring(queue: u64) -> u64 {
    table(queue) + 0x3000
}

/// A chain that an honest driver has made available.
struct Chain {
    descriptors: Vec<u16>,
    writable: u32,
    guards: Vec<u64>,
}

/// A queue as its driver sees it.
#[derive(Default)]
struct Driver {
    size: u16,
    available: u16,
    used: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Chain>,
}

/// Counts what a device was given and has returned.
#[derive(Default)]
struct Balance {
    taken: u16,
    used: u16,
    open: i64,
}

struct Guest {
    memory: GuestMemoryMmap,
    transport: MmioTransport,
    offered: u64,
    accepted: u64,
    queues: u64,
    drivers: Vec<Driver>,
    balances: Vec<Balance>,
    next_buffer: u64,
    /// The program has done nothing yet that no honest driver does.
    honest: bool,
}

/// Plays a program to its end.
#[allow(clippy::unwrap_used)]
pub fn play<W: World>(mut world: W, input: &mut Input) {
    let half = (MEMORY / 2) as usize;
    let ranges = [(GuestAddress(0), half), (GuestAddress(MEMORY / 2), half)];
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    let device = world.device();
    let mut events = EventManager::<Subscriber>::new().unwrap();
    events.add_subscriber(Arc::clone(&device) as Subscriber);
    let (offered, queues) = {
        let device = husk_vmm::lock(&device);
        (device.features(), device.queue_sizes().len() as u64)
    };
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let transport = MmioTransport::new(device, memory.clone(), line).unwrap();
    let mut guest = Guest {
        memory,
        transport,
        offered,
        accepted: 0,
        queues,
        drivers: Vec::new(),
        balances: Vec::new(),
        next_buffer: BUFFERS,
        honest: W::KEEPS_MEMORY,
    };
    for _ in 0..MAX_STEPS {
        let Some(number) = input.next() else { break };
        match number % op::COUNT {
            op::KICK => {
                let queue = input.byte();
                if !world.notify() {
                    guest.write(QUEUE_NOTIFY, u32::from(queue) % 4);
                }
                serve(&mut events, &mut world);
            }
            op::HOST => {
                world.host(input);
                serve(&mut events, &mut world);
            }
            number => guest.step(number, input),
        }
        guest.check();
    }
    serve(&mut events, &mut world);
    guest.check();
}

#[allow(clippy::unwrap_used)]
fn serve(events: &mut EventManager<Subscriber>, world: &mut impl World) {
    for _ in 0..MAX_ROUNDS {
        if events.run_with_timeout(0).unwrap() == 0 {
            break;
        }
        world.settle();
    }
    world.settle();
}

impl Guest {
    fn step(&mut self, number: u8, input: &mut Input) {
        match number {
            op::WRITE_REGISTER => {
                self.honest = false;
                let offset = u64::from(input.byte()) * 2;
                // Notifications are an operation of their own.
                if offset != QUEUE_NOTIFY {
                    self.write(offset, input.u32());
                }
            }
            op::READ_REGISTER => {
                let (offset, length) = (u64::from(input.u16() % 0x400), usize::from(input.byte() % 17));
                self.transport.read(offset, &mut [0; 16][..length]);
            }
            op::NEGOTIATE => self.negotiate(input.u64(), input.byte()),
            op::RESET => self.reset(),
            op::REQUEST => self.request(input),
            op::DESCRIPTOR => {
                self.honest = false;
                let (queue, index) = (u64::from(input.byte()) % self.queues, u64::from(input.byte()));
                let address = self.address(input);
                let (length, flags, next) = (input.u32(), input.byte(), input.byte());
                self.descriptor(table(queue) + index * 16, address, length, flags.into(), next.into());
            }
            op::PUBLISH => {
                self.honest = false;
                let (queue, head) = (u64::from(input.byte()) % self.queues, input.u16());
                let available = self.get(available_ring(queue) + 2);
                let size = self.drivers.get(queue as usize).map_or(QUEUE_SIZE, |driver| driver.size).max(1);
                self.put(available_ring(queue) + 4 + u64::from(available % size) * 2, &head.to_le_bytes());
                self.put(available_ring(queue) + 2, &available.wrapping_add(1).to_le_bytes());
            }
            op::AVAILABLE => {
                self.honest = false;
                let queue = u64::from(input.byte()) % self.queues;
                self.put(available_ring(queue) + 2, &input.u16().to_le_bytes());
            }
            op::MEMORY => {
                self.honest = false;
                let address = self.address(input);
                let length = input.byte().into();
                self.put(address, input.bytes(length));
            }
            // Which interrupts the driver wants: its flags, or `used_event`.
            op::WISHES => {
                let queue = u64::from(input.byte()) % self.queues;
                let size = self.drivers.get(queue as usize).map_or(QUEUE_SIZE, |driver| driver.size);
                self.put(available_ring(queue), &[input.byte() & 1, 0]);
                self.put(available_ring(queue) + 4 + u64::from(size) * 2, &input.u16().to_le_bytes());
            }
            op::SAVE => {
                let _ = (self.transport.save(), self.transport.report());
            }
            _ => unreachable!(),
        }
    }

    /// An address near the queues and buffers, or any.
    fn address(&self, input: &mut Input) -> u64 {
        match input.byte() {
            0 => input.u64(),
            1 => MEMORY.wrapping_sub(u64::from(input.u16())),
            2 => (MEMORY / 2).wrapping_sub(u64::from(input.byte())),
            _ => u64::from(input.u16()) * 4,
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    fn get(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap_or_default()
    }

    fn descriptor(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &length.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    fn reset(&mut self) {
        self.write(0x70, 0);
        self.drivers.clear();
        self.balances.clear();
    }

    /// Does what a driver does until its device works (virtio 1.2 §3.1.1). `refused` are the features that it does not
    /// accept, `sizes` says how large its queues are.
    fn negotiate(&mut self, refused: u64, sizes: u8) {
        self.reset();
        let features = self.offered & !(refused & !(1 << 32));
        self.accepted = features;
        for status in [1, 3] {
            self.write(0x70, status);
        }
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x24, select);
            self.write(0x20, half);
        }
        self.write(0x70, 11);
        for queue in 0..self.queues {
            self.write(0x30, queue as u32);
            let mut max = [0; 4];
            self.transport.read(0x34, &mut max);
            let size = (u32::from_le_bytes(max) as u16 >> (sizes & 7)).clamp(1, QUEUE_SIZE);
            self.write(0x38, size.into());
            for (register, address) in
                [(0x80, table(queue)), (0x90, available_ring(queue)), (0xa0, used_ring(queue))]
            {
                self.write(register, address as u32);
                self.write(register + 4, (address >> 32) as u32);
            }
            self.write(0x44, 1);
            self.put(available_ring(queue), &[0; 4]);
            self.put(used_ring(queue), &[0; 4]);
            let free = (0..size).rev().collect();
            self.drivers.push(Driver { size, free, ..Driver::default() });
        }
        self.write(0x70, 15);
    }

    /// Makes a chain available as an honest driver does: readable buffers, then writable ones.
    fn request(&mut self, input: &mut Input) {
        let (queue, shape) = (u64::from(input.byte()) % self.queues, input.byte());
        let (pieces, indirect) = (1 + u16::from(shape & 3), shape & 4 != 0 && self.accepted & 1 << 28 != 0);
        let length = usize::from(input.u16() % 0x1100);
        let writable = u32::from(input.u16());
        let bytes = input.bytes(length);
        let mut parts = Vec::new();
        for piece in bytes.chunks(bytes.len().div_ceil(pieces.into()).max(1)) {
            parts.push((self.buffer(piece.len() as u64, Some(piece)), piece.len() as u32, 0));
        }
        for piece in 0..u32::from(pieces) {
            // What does not divide is in the first.
            let rest = if piece == 0 { writable % u32::from(pieces) } else { 0 };
            let length = writable / u32::from(pieces) + rest;
            if length > 0 {
                parts.push((self.buffer(length.into(), None), length, WRITE));
            }
        }
        if parts.is_empty() || parts.iter().any(|(address, ..)| address.is_none()) {
            return;
        }
        let parts: Vec<(u64, u32, u16)> = parts
            .into_iter()
            .filter_map(|(address, length, flags)| Some((address?, length, flags)))
            .collect();
        self.publish(queue, &parts, indirect);
    }

    /// Room for a buffer, with a guard behind it.
    fn buffer(&mut self, length: u64, content: Option<&[u8]>) -> Option<u64> {
        let address = self.next_buffer;
        let end = address + length + GUARD.len() as u64;
        if end > MEMORY {
            return None;
        }
        self.next_buffer = end;
        self.put(address, content.unwrap_or_default());
        self.put(address + length, &GUARD);
        Some(address)
    }

    fn publish(&mut self, queue: u64, parts: &[(u64, u32, u16)], indirect: bool) {
        let place = if indirect { self.buffer(parts.len() as u64 * 16, None) } else { None };
        let Some(driver) = self.drivers.get_mut(queue as usize) else { return };
        let wanted = if place.is_some() { 1 } else { parts.len() };
        if driver.free.len() < wanted {
            return;
        }
        let descriptors = driver.free.split_off(driver.free.len() - wanted);
        let writable =
            parts.iter().filter(|(_, _, flags)| flags & WRITE != 0).map(|(_, length, _)| length).sum();
        let guards = parts.iter().map(|&(address, length, _)| address + u64::from(length)).collect();
        let slot = available_ring(queue) + 4 + u64::from(driver.available % driver.size) * 2;
        driver.available = driver.available.wrapping_add(1);
        let (available, head) = (driver.available, descriptors[0]);
        driver.chains.insert(head, Chain { descriptors: descriptors.clone(), writable, guards });
        for (number, &(address, length, flags)) in parts.iter().enumerate() {
            let flags = flags | if number + 1 < parts.len() { NEXT } else { 0 };
            match place {
                Some(place) => {
                    self.descriptor(place + number as u64 * 16, address, length, flags, number as u16 + 1);
                }
                None => {
                    let next = descriptors.get(number + 1).copied().unwrap_or_default();
                    let at = table(queue) + u64::from(descriptors[number]) * 16;
                    self.descriptor(at, address, length, flags, next);
                }
            }
        }
        if let Some(place) = place {
            let at = table(queue) + u64::from(head) * 16;
            self.descriptor(at, place, parts.len() as u32 * 16, INDIRECT, 0);
        }
        self.put(slot, &head.to_le_bytes());
        self.put(available_ring(queue) + 2, &available.to_le_bytes());
    }

    fn check(&mut self) {
        let queues = self.transport.report().queues;
        if queues.is_empty() {
            self.balances.clear();
            return;
        }
        self.balances.resize_with(queues.len(), Balance::default);
        for (queue, balance) in queues.iter().zip(&mut self.balances) {
            let taken = queue.taken.wrapping_sub(balance.taken).cast_signed();
            let used = queue.used.wrapping_sub(balance.used).cast_signed();
            balance.open += i64::from(taken) - i64::from(used);
            assert!(balance.open >= 0, "{} more chains were returned than were given", -balance.open);
            (balance.taken, balance.used) = (queue.taken, queue.used);
        }
        if self.honest {
            self.check_honest();
        }
    }

    fn check_honest(&mut self) {
        let memory = self.memory.clone();
        for (queue, driver) in (0..).zip(&mut self.drivers) {
            let read = |address| memory.read_obj::<u16>(GuestAddress(address)).unwrap_or_default();
            let used = read(used_ring(queue) + 2);
            while driver.used != used {
                let slot = used_ring(queue) + 4 + u64::from(driver.used % driver.size) * 8;
                driver.used = driver.used.wrapping_add(1);
                let (head, high) = (read(slot), read(slot + 2));
                let written = u32::from(read(slot + 4)) | u32::from(read(slot + 6)) << 16;
                let chain = driver.chains.remove(&head).filter(|_| high == 0);
                let Some(chain) = chain else { panic!("queue {queue}: {head} is no head that was given") };
                assert!(written <= chain.writable, "{written} bytes written to {}", chain.writable);
                for address in chain.guards {
                    let mut guard = [0; GUARD.len()];
                    let _ = memory.read_slice(&mut guard, GuestAddress(address));
                    assert_eq!(guard, GUARD, "written behind a buffer, at {address:#x}");
                }
                driver.free.extend(chain.descriptors);
            }
        }
    }
}

/// Does what a driver does until its device works, with all features and queues of its largest size.
pub fn set_up(transport: &mut MmioTransport) {
    let read = |transport: &mut MmioTransport, register| {
        let mut value = [0; 4];
        transport.read(register, &mut value);
        u32::from_le_bytes(value)
    };
    let write =
        |transport: &mut MmioTransport, register, value: u32| transport.write(register, &value.to_le_bytes());
    for status in [1, 3] {
        write(transport, 0x70, status);
    }
    for select in [0, 1] {
        write(transport, 0x14, select);
        let features = read(transport, 0x10);
        write(transport, 0x24, select);
        write(transport, 0x20, features);
    }
    write(transport, 0x70, 11);
    for queue in 0..8 {
        write(transport, 0x30, queue);
        let size = read(transport, 0x34);
        if size == 0 {
            break;
        }
        write(transport, 0x38, size);
        let (descriptors, available, used) =
            (table(queue.into()), available_ring(queue.into()), used_ring(queue.into()));
        for (register, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
            write(transport, register, address as u32);
        }
        write(transport, 0x44, 1);
    }
    write(transport, 0x70, 15);
}

/// Writes programs, for seeds.
#[derive(Clone, Debug, Default)]
pub struct Program(Output);

impl Program {
    /// A program for a target that reads `head` first.
    #[must_use]
    pub fn new(head: &[u8]) -> Self {
        Self(Output(head.to_vec()))
    }

    /// Negotiates every feature but these.
    #[must_use]
    pub fn negotiate(self, refused: u64) -> Self {
        Self(self.0.byte(op::NEGOTIATE).u64(refused).byte(0))
    }

    /// A request of these bytes with room for an answer, in one buffer each.
    #[must_use]
    pub fn request(self, queue: u8, bytes: &[u8], writable: u16) -> Self {
        self.request_in(queue, 0, bytes, writable)
    }

    /// The same in several buffers; with 4, in a table of its own.
    #[must_use]
    pub fn request_in(self, queue: u8, shape: u8, bytes: &[u8], writable: u16) -> Self {
        let length = u16::try_from(bytes.len()).unwrap_or_default();
        Self(self.0.byte(op::REQUEST).byte(queue).byte(shape).u16(length).u16(writable).bytes(bytes))
    }

    /// Notifies the device.
    #[must_use]
    pub fn kick(self, queue: u8) -> Self {
        Self(self.0.byte(op::KICK).byte(queue))
    }

    /// The host does something.
    #[must_use]
    pub fn host(self, what: &[u8]) -> Self {
        Self(self.0.byte(op::HOST).bytes(what))
    }

    /// Resets the device.
    #[must_use]
    pub fn reset(self) -> Self {
        Self(self.0.byte(op::RESET))
    }

    /// Saves the device's registers, and reads its configuration.
    #[must_use]
    pub fn look(self) -> Self {
        Self(self.0.byte(op::SAVE).byte(op::READ_REGISTER).u16(0x100).byte(8))
    }

    /// Writes a descriptor as no honest driver does, and makes it available.
    #[must_use]
    pub fn strange(self, queue: u8, address: u64, length: u32, flags: u8) -> Self {
        let written = self.0.byte(op::DESCRIPTOR).byte(queue).byte(0).byte(0).u64(address).u32(length);
        Self(written.byte(flags).byte(0).byte(op::PUBLISH).byte(queue).u16(0))
    }

    /// The bytes.
    #[must_use]
    pub fn done(self) -> Vec<u8> {
        self.0.0
    }
}
