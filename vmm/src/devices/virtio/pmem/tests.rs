//! The persistent memory device, as its driver sees it.
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Pmem;
use super::device::{DONE, FAILED};
use super::persist::{RestoreError, State};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::test_utils::{DriverQueue, Part, activation, memory, strange_rings};
use crate::memory::Range;

const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x10_1000;
const RANGE: Range = Range { start: GuestAddress(4 << 30), size: 6 << 20 };

struct Guest {
    events: EventManager<Arc<Mutex<Pmem>>>,
    memory: GuestMemoryMmap,
    queue: DriverQueue,
}

impl Guest {
    fn new() -> Self {
        let memory = memory();
        let device = Arc::new(Mutex::new(Pmem::new(RANGE).unwrap()));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        let queue = DriverQueue::new(&memory, 0, 64);
        device.lock().unwrap().activate(activation(&memory, &[&queue], u64::MAX)).unwrap();
        let mut guest = Self { events, memory, queue };
        guest.run();
        guest
    }

    fn run(&mut self) {
        let start = Instant::now();
        while self.events.run_with_timeout(0).unwrap() > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "the event loop spins");
        }
    }

    /// Sends a request; returns the length of the answer, and the answer.
    fn ask(&mut self, parts: &[Part]) -> (u32, [u8; 4]) {
        self.memory.write_obj([7u8; 4], GuestAddress(ANSWER)).unwrap();
        self.queue.add(parts);
        self.queue.kick();
        self.run();
        let (_, written) = self.queue.used().expect("an answer");
        (written, self.memory.read_obj(GuestAddress(ANSWER)).unwrap())
    }
}

#[test]
fn a_flush_is_done_and_nothing_else_is() {
    let mut guest = Guest::new();
    for (request, answer) in [(0u32, DONE), (1, FAILED), (u32::MAX, FAILED)] {
        guest.memory.write_obj(request.to_le(), GuestAddress(REQUEST)).unwrap();
        let parts = [Part::readable(REQUEST, 4), Part::writable(ANSWER, 4)];
        assert_eq!(guest.ask(&parts), (4, answer), "{request}");
    }
}

#[test]
fn a_malformed_request_ends_too() {
    let mut guest = Guest::new();
    guest.memory.write_obj(0u32, GuestAddress(REQUEST)).unwrap();
    assert_eq!(guest.ask(&[Part::readable(REQUEST, 3), Part::writable(ANSWER, 4)]), (4, FAILED));
    assert_eq!(guest.ask(&[Part::writable(ANSWER, 4)]), (4, FAILED));
    assert_eq!(guest.ask(&[Part::readable(REQUEST, 4)]), (0, [7; 4]));
    assert_eq!(guest.ask(&[Part::readable(REQUEST, 4), Part::writable(1 << 40, 4)]), (0, [7; 4]));
}

#[test]
fn the_driver_is_told_where_the_range_is() {
    let device = Pmem::new(RANGE).unwrap();
    let mut config = [0xff; 20];
    device.read_config(0, &mut config);
    assert_eq!(config[..8], (4u64 << 30).to_le_bytes());
    assert_eq!(config[8..16], (6u64 << 20).to_le_bytes());
    assert_eq!(config[16..], [0; 4]);
}

#[test]
fn a_saved_device_is_restored() {
    let saved = serde_json::to_string(&Pmem::new(RANGE).unwrap().save()).unwrap();
    let state: State = serde_json::from_str(&saved).unwrap();
    assert_eq!(Pmem::restore(&state).unwrap().save(), state);
    assert_eq!((state.start, state.size), (RANGE.start.0, RANGE.size));
    let error = Pmem::restore(&State { version: 2, ..state }).err().unwrap();
    assert!(matches!(error, RestoreError::Version(2)), "{error}");
}

proptest! {
    #[test]
    fn no_ring_is_too_strange(
        ring in strange_rings(70),
    ) {
        let mut guest = Guest::new();
        ring.write(&mut guest.queue, REQUEST);
        guest.run();
    }
}
