//! The entropy device, as its driver sees it.
#![allow(clippy::cast_possible_truncation)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Rng;
use super::device::{BUDGET, MAX_REQUEST};
use super::persist::{RestoreError, State};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::test_utils::{DriverQueue, Part, activation, memory, strange_rings};

const BUFFER: u64 = 0x10_0000;

struct Guest {
    device: Arc<Mutex<Rng>>,
    events: EventManager<Arc<Mutex<Rng>>>,
    memory: GuestMemoryMmap,
    queue: DriverQueue,
}

impl Guest {
    fn new() -> Self {
        let memory = memory();
        let device = Arc::new(Mutex::new(Rng::new().unwrap()));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        let queue = DriverQueue::new(&memory, 0, 64);
        let activation = activation(&memory, &[&queue], u64::MAX);
        device.lock().unwrap().activate(activation).unwrap();
        let mut guest = Self { device, events, memory, queue };
        guest.run();
        guest
    }

    fn run(&mut self) {
        let start = Instant::now();
        while self.events.run_with_timeout(0).unwrap() > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "the event loop spins");
        }
    }

    fn read(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
        bytes
    }
}

#[test]
fn requests_get_different_bytes() {
    let mut guest = Guest::new();
    let mut seen = Vec::new();
    for _ in 0..3 {
        guest.queue.add(&[Part::writable(BUFFER, 24), Part::writable(BUFFER + 24, 40)]);
        guest.queue.kick();
        guest.run();
        assert_eq!(guest.queue.used().map(|(_, len)| len), Some(64));
        let bytes = guest.read(64);
        assert!(!seen.contains(&bytes) && bytes != [0; 64]);
        seen.push(bytes);
    }
    assert_eq!(guest.read(80)[64..], [0; 16]);
}

#[test]
fn a_large_request_gets_a_part() {
    let mut guest = Guest::new();
    guest.queue.add(&[Part::writable(BUFFER, 1 << 20)]);
    guest.queue.kick();
    guest.run();
    assert_eq!(guest.queue.used().map(|(_, len)| len), Some(MAX_REQUEST as u32));
    assert_eq!(guest.read(MAX_REQUEST + 1)[MAX_REQUEST], 0);
}

#[test]
fn a_greedy_guest_waits_for_the_next_period() {
    let mut guest = Guest::new();
    for _ in 0..64 {
        guest.queue.add(&[Part::writable(BUFFER, MAX_REQUEST as u32)]);
    }
    let start = Instant::now();
    guest.queue.kick();
    // One event is at most one budget.
    guest.events.run_with_timeout(1000).unwrap();
    let mut answered = std::iter::from_fn(|| guest.queue.used()).count();
    assert_eq!(answered, BUDGET / MAX_REQUEST);
    while answered < 64 {
        guest.events.run_with_timeout(1000).unwrap();
        answered += std::iter::from_fn(|| guest.queue.used()).count();
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    assert!(start.elapsed() >= Duration::from_millis(30), "{:?}", start.elapsed());
}

#[test]
fn a_reset_device_is_as_new() {
    let mut guest = Guest::new();
    guest.device.lock().unwrap().reset();
    guest.queue.add(&[Part::writable(BUFFER, 8)]);
    guest.queue.kick();
    guest.run();
    assert_eq!(guest.queue.used(), None);
    let again = activation(&guest.memory, &[&guest.queue], u64::MAX);
    guest.device.lock().unwrap().activate(again).unwrap();
    guest.run();
    assert_eq!(guest.queue.used().map(|(_, len)| len), Some(8));
}

#[test]
fn a_saved_device_is_restored() {
    let saved = serde_json::to_string(&Rng::new().unwrap().save()).unwrap();
    let state: State = serde_json::from_str(&saved).unwrap();
    assert_eq!(Rng::restore(&state).unwrap().save(), state);
    let error = Rng::restore(&State { version: 2 }).err().unwrap();
    assert!(matches!(error, RestoreError::Version(2)), "{error}");
}

proptest! {
    #[test]
    fn no_ring_is_too_strange(
        ring in strange_rings(70),
    ) {
        let mut guest = Guest::new();
        ring.write(&mut guest.queue, BUFFER);
        guest.run();
    }
}
