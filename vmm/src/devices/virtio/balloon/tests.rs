//! The balloon, as its driver sees it.
#![allow(clippy::cast_possible_truncation)]

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Balloon;
use super::persist::{RestoreError, State};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::interrupt::{CONFIG_CHANGE, Interrupt};
use crate::devices::virtio::test_utils::{DriverQueue, MEMORY_SIZE, Part, activation, memory, strange_rings};
use crate::memory::{PAGE, Range, resident_bytes};

const REQUEST: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;

struct Guest {
    device: Arc<Mutex<Balloon>>,
    events: EventManager<Arc<Mutex<Balloon>>>,
    memory: GuestMemoryMmap,
    inflate: DriverQueue,
    deflate: DriverQueue,
    report: DriverQueue,
    interrupt: Arc<Interrupt>,
}

impl Guest {
    fn new() -> Self {
        let memory = memory();
        let device = Arc::new(Mutex::new(Balloon::new().unwrap()));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        let queue = |index| DriverQueue::new(&memory, index, 64);
        let (inflate, deflate, report) = (queue(0), queue(1), queue(2));
        let activation = activation(&memory, &[&inflate, &deflate, &report], u64::MAX);
        let interrupt = activation.interrupt.clone();
        device.lock().unwrap().activate(activation).unwrap();
        let mut guest = Self { device, events, memory, inflate, deflate, report, interrupt };
        guest.run();
        guest
    }

    fn lock(&self) -> MutexGuard<'_, Balloon> {
        self.device.lock().unwrap()
    }

    fn run(&mut self) {
        let start = Instant::now();
        while self.events.run_with_timeout(0).unwrap() > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "the event loop spins");
        }
    }

    /// Bytes of guest memory that are in the host's memory.
    fn resident(&self) -> u64 {
        resident_bytes(&self.memory, &[Range { start: GuestAddress(0), size: MEMORY_SIZE as u64 }])
    }

    /// Fills so many pages with ones, from `DATA` on.
    fn touch(&self, pages: u64) {
        let ones = vec![1; (pages * PAGE) as usize];
        self.memory.write_slice(&ones, GuestAddress(DATA)).unwrap();
    }

    /// Whether a page still has its content.
    fn has(&self, page: u64) -> bool {
        self.memory.read_obj::<u8>(GuestAddress(DATA + page * PAGE)).unwrap() == 1
    }

    /// Writes page numbers, counted from `DATA`, and makes a chain of them.
    fn numbers(&self, pages: &[u64]) -> [Part; 2] {
        let bytes: Vec<u8> =
            pages.iter().flat_map(|page| ((DATA / PAGE + page) as u32).to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        // The second part begins in the midst of a number.
        let len = bytes.len() as u32;
        [Part::readable(REQUEST, 3), Part::readable(REQUEST + 3, len - 3)]
    }
}

#[test]
fn the_host_says_how_much_and_the_guest_how_far() {
    let guest = Guest::new();
    guest.interrupt.acknowledge(u32::MAX);
    guest.lock().set_size_mib(3);
    assert_eq!(guest.interrupt.status(), CONFIG_CHANGE);
    let mut wanted = [0; 4];
    guest.lock().read_config(0, &mut wanted);
    assert_eq!(u32::from_le_bytes(wanted), 768);

    guest.lock().write_config(4, &512_u32.to_le_bytes());
    assert_eq!(guest.lock().actual_mib(), 2);
    let mut space = [9; 12];
    guest.lock().read_config(0, &mut space);
    assert_eq!(space, [0, 3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0]);
    // Single bytes of `actual` can be written, and nothing else.
    guest.lock().write_config(5, &[4]);
    assert_eq!(guest.lock().actual_mib(), 4);
    guest.lock().write_config(0, &[7; 4]);
    guest.lock().write_config(8, &[7; 4]);
    guest.lock().write_config(u64::MAX, &[7; 4]);
    guest.lock().write_config(2, &[7, 7, 0, 8]);
    guest.lock().read_config(0, &mut space);
    assert_eq!(space, [0, 3, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn inflated_pages_go_back_to_the_host() {
    let mut guest = Guest::new();
    guest.touch(300);
    let before = guest.resident();
    let pages: Vec<u64> = (10..200).rev().chain([250]).collect();
    let parts = guest.numbers(&pages);
    guest.inflate.add(&parts);
    guest.inflate.kick();
    guest.run();
    assert!(guest.inflate.used().is_some());
    // This is read before a page is touched, which would bring a new one. The
    // request itself takes some memory.
    let after = guest.resident();
    assert!(before - after >= 180 * PAGE, "{before} then {after}");
    for page in 0..300 {
        assert_eq!(guest.has(page), !pages.contains(&page), "page {page}");
    }
    let parts = guest.numbers(&pages);
    guest.deflate.add(&parts);
    guest.deflate.kick();
    guest.run();
    assert!(guest.deflate.used().is_some());
}

#[test]
fn reported_pages_go_back_to_the_host() {
    let mut guest = Guest::new();
    guest.touch(100);
    guest.report.add(&[
        Part::writable(DATA + 10 * PAGE, 5 * PAGE as u32),
        Part::writable(DATA + 20 * PAGE + 1, 2 * PAGE as u32),
        // The device may only read this range, so it must not release it.
        Part::readable(DATA + 30 * PAGE, PAGE as u32),
    ]);
    guest.report.kick();
    guest.run();
    assert!(guest.report.used().is_some());
    let gone: Vec<u64> = (0..100).filter(|&page| !guest.has(page)).collect();
    assert_eq!(gone, [10, 11, 12, 13, 14, 21]);
}

#[test]
fn many_requests_are_answered_in_portions() {
    let mut guest = Guest::new();
    for _ in 0..60 {
        guest.report.add(&[Part::writable(DATA, PAGE as u32)]);
    }
    guest.report.kick();
    guest.events.run_with_timeout(1000).unwrap();
    assert_eq!(std::iter::from_fn(|| guest.report.used()).count(), 8);
    guest.run();
    assert_eq!(std::iter::from_fn(|| guest.report.used()).count(), 52);
}

#[test]
fn a_reset_balloon_is_empty() {
    let mut guest = Guest::new();
    guest.lock().set_size_mib(3);
    guest.lock().write_config(4, &512_u32.to_le_bytes());
    guest.lock().reset();
    assert_eq!(guest.lock().actual_mib(), 0);
    guest.touch(1);
    let parts = guest.numbers(&[0]);
    guest.inflate.add(&parts);
    guest.inflate.kick();
    guest.run();
    assert!(guest.inflate.used().is_none() && guest.has(0));
    // A new driver learns the size that the host still wants.
    let again = activation(&guest.memory, &[&guest.inflate, &guest.deflate, &guest.report], 0);
    guest.lock().activate(again).unwrap();
    guest.run();
    assert!(guest.inflate.used().is_some() && !guest.has(0));
    let mut wanted = [0; 4];
    guest.lock().read_config(0, &mut wanted);
    assert_eq!(u32::from_le_bytes(wanted), 768);
}

#[test]
fn a_saved_balloon_is_restored() {
    let mut balloon = Balloon::new().unwrap();
    balloon.set_size_mib(5);
    balloon.write_config(4, &768_u32.to_le_bytes());
    let saved = serde_json::to_string(&balloon.save()).unwrap();
    let state: State = serde_json::from_str(&saved).unwrap();
    let restored = Balloon::restore(&state).unwrap();
    assert_eq!(restored.save(), balloon.save());
    assert_eq!((restored.wanted, restored.actual_mib()), (5 * 256, 3));
    let newer = State { version: 2, ..state };
    let error = Balloon::restore(&newer).err().unwrap();
    assert!(matches!(error, RestoreError::Version(2)), "{error}");
}

proptest! {
    #[test]
    fn no_ring_is_too_strange(
        ring in strange_rings(70),
        numbers in prop::collection::vec(any::<u32>(), 64),
    ) {
        let mut guest = Guest::new();
        let bytes: Vec<u8> = numbers.into_iter().flat_map(u32::to_le_bytes).collect();
        guest.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        for queue in [&mut guest.inflate, &mut guest.deflate, &mut guest.report] {
            ring.write(queue, DATA);
        }
        guest.run();
    }
}
