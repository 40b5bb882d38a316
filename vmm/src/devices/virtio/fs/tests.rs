//! The device between a driver and a server, both played by the test.
#![allow(clippy::cast_possible_truncation)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use husk_vmm_api::{FsState, MAX_FUSE_MESSAGE, RateLimit};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::device::{Fs, FsError, HIPRIO, QUEUE_SIZES, REQUEST};
use super::header::{IN_HEADER, InHeader, OUT_HEADER, OutHeader};
use super::in_flight::MAX_IN_FLIGHT;
use super::persist::{RestoreError, State};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::rate::Limiter;
use crate::devices::virtio::test_utils::{DriverQueue, Part, activation, memory, strange_rings};

const INPUT: u64 = 0x10_0000;
const OUTPUT: u64 = 0x100_0000;
const GETATTR: u32 = 3;
const FORGET: u32 = 2;
const INIT: u32 = 26;

struct Guest {
    device: Arc<Mutex<Fs>>,
    events: EventManager<Arc<Mutex<Fs>>>,
    memory: GuestMemoryMmap,
    queues: [DriverQueue; 2],
    server: Option<OwnedFd>,
}

impl Guest {
    fn new() -> Self {
        Self::limited(None)
    }

    fn limited(limit: Option<RateLimit>) -> Self {
        let memory = memory();
        let (ours, server) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_NONBLOCK).unwrap();
        let mut device = Fs::new("husk").unwrap();
        device.attach(ours).unwrap();
        device.limit(Limiter::new(limit.as_ref())).unwrap();
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        let queues = [0, 1].map(|index| DriverQueue::new(&memory, index as u64, QUEUE_SIZES[index]));
        let mut guest = Self { device, events, memory, queues, server: Some(server) };
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        let activation = activation(&self.memory, &[&self.queues[0], &self.queues[1]], u64::MAX);
        self.device.lock().unwrap().activate(activation).unwrap();
        self.run();
    }

    fn run(&mut self) {
        let start = Instant::now();
        while self.events.run_with_timeout(0).unwrap() > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "the event loop spins");
        }
    }

    /// Makes a request available: its header and `body`, and room for an answer.
    fn ask(&mut self, queue: usize, opcode: u32, unique: u64, body: &[u8], room: u32) -> u16 {
        let header = request(opcode, unique, body.len());
        self.memory.write_slice(&header, GuestAddress(INPUT)).unwrap();
        self.memory.write_slice(body, GuestAddress(INPUT + IN_HEADER as u64)).unwrap();
        let total = (IN_HEADER + body.len()) as u32;
        let mut parts = vec![Part::readable(INPUT, 24), Part::readable(INPUT + 24, total - 24)];
        if room > 0 {
            parts.extend([Part::writable(OUTPUT, 8), Part::writable(OUTPUT + 8, room - 8)]);
        }
        let head = self.queues[queue].add(&parts);
        self.queues[queue].kick();
        head
    }

    /// The next request that the server has received.
    fn received(&self) -> Option<(InHeader, Vec<u8>)> {
        let mut packet = vec![0; MAX_FUSE_MESSAGE + 1];
        let len = recv(self.server.as_ref().unwrap().as_raw_fd(), &mut packet, MsgFlags::empty()).ok()?;
        packet.truncate(len);
        let (header, body) = InHeader::read_from_prefix(&packet).unwrap();
        Some((header, body.to_vec()))
    }

    fn answer(&self, packet: &[u8]) {
        send(self.server.as_ref().unwrap().as_raw_fd(), packet, MsgFlags::empty()).unwrap();
    }

    fn output(&self, len: usize) -> (OutHeader, Vec<u8>) {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(OUTPUT)).unwrap();
        let (header, body) = OutHeader::read_from_prefix(&bytes).unwrap();
        (header, body.to_vec())
    }
}

fn request(opcode: u32, unique: u64, body: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; IN_HEADER];
    bytes[..4].copy_from_slice(&((IN_HEADER + body) as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    bytes
}

fn packet(unique: u64, body: &[u8]) -> Vec<u8> {
    let header = OutHeader { len: (OUT_HEADER + body.len()) as u32, error: 0, unique };
    [header.as_bytes(), body].concat()
}

#[test]
fn requests_wait_for_their_limit_and_what_must_not_wait_does_not() {
    let limit = RateLimit { operations_per_second: 20, operations_burst: 2, ..RateLimit::default() };
    let mut guest = Guest::limited(Some(limit));
    let start = Instant::now();
    for unique in 0..5 {
        guest.ask(REQUEST, GETATTR, unique, b"body", 64);
    }
    guest.run();
    // All requests of this driver are at one place, so it is as long as the others.
    guest.ask(HIPRIO, FORGET, 9, b"body", 0);
    guest.run();
    let at_once: Vec<u32> =
        std::iter::from_fn(|| guest.received()).map(|(header, _)| header.opcode).collect();
    if start.elapsed() < Duration::from_millis(50) {
        assert_eq!(at_once, [GETATTR, GETATTR, FORGET]);
    }
    let mut count = at_once.len();
    while count < 6 {
        assert!(start.elapsed() < Duration::from_secs(20), "{count} came");
        guest.events.run_with_timeout(10).unwrap();
        count += std::iter::from_fn(|| guest.received()).count();
    }
    // The third of them waited for 50 ms, the fifth for 150.
    assert!(start.elapsed() >= Duration::from_millis(149), "{:?}", start.elapsed());
}

#[test]
fn an_answer_reaches_the_request_that_it_is_for() {
    let mut guest = Guest::new();
    // Two requests with the same number, which only a hostile guest sends.
    let heads = [0, 1].map(|_| guest.ask(REQUEST, GETATTR, 77, b"body", 64));
    guest.run();
    let asked = [0, 1].map(|_| guest.received().unwrap());
    assert_eq!(asked[0].1, b"body");
    assert_ne!(asked[0].0.unique, asked[1].0.unique);
    for order in [1, 0] {
        guest.answer(&packet(asked[order].0.unique, b"attributes"));
        guest.run();
        assert_eq!(guest.queues[REQUEST].used(), Some((heads[order], 26)));
        let (header, body) = guest.output(26);
        assert_eq!((header.unique, header.len, body.as_slice()), (77, 26, &b"attributes"[..]));
    }
}

#[test]
fn what_has_no_answer_is_done_when_it_is_sent() {
    let mut guest = Guest::new();
    let head = guest.ask(HIPRIO, FORGET, 5, &[1; 8], 0);
    guest.run();
    assert_eq!(guest.queues[HIPRIO].used(), Some((head, 0)));
    assert_eq!(guest.received().unwrap().1, [1; 8]);
}

#[test]
fn a_large_write_and_a_large_read_go_through_whole() {
    let mut guest = Guest::new();
    let data: Vec<u8> = (0..128 << 10).map(|n: u32| (n % 251) as u8).collect();
    let room = (OUT_HEADER + data.len()) as u32;
    guest.ask(REQUEST, GETATTR, 1, &data, room);
    guest.run();
    let (header, body) = guest.received().unwrap();
    assert!(body == data);
    guest.answer(&packet(header.unique, &data));
    guest.run();
    assert_eq!(guest.queues[REQUEST].used().unwrap().1, room);
    assert!(guest.output(room as usize).1 == data);
}

#[test]
fn a_server_that_dies_leaves_errors_and_nobody_waiting() {
    let mut guest = Guest::new();
    let waiting = guest.ask(REQUEST, GETATTR, 9, b"", 64);
    guest.run();
    assert_eq!(guest.queues[REQUEST].used(), None);
    guest.server = None;
    guest.run();
    assert_eq!(guest.queues[REQUEST].used(), Some((waiting, OUT_HEADER as u32)));
    assert_eq!(guest.output(16).0.error, -libc::EIO);
    for _ in 0..3 {
        let late = guest.ask(REQUEST, GETATTR, 10, b"", 64);
        guest.run();
        let forgotten = guest.ask(HIPRIO, FORGET, 11, &[0; 8], 0);
        guest.run();
        assert_eq!(guest.queues[REQUEST].used(), Some((late, OUT_HEADER as u32)));
        assert_eq!(guest.output(16).0.unique, 10);
        assert_eq!(guest.queues[HIPRIO].used(), Some((forgotten, 0)));
    }
    let device = guest.device.lock().unwrap();
    assert_eq!(device.state(), FsState::Gone);
}

#[test]
fn requests_wait_for_a_server_that_is_slow() {
    let mut guest = Guest::new();
    let body = vec![7; 100 << 10];
    // These are more requests than the socket holds.
    for unique in 0..20 {
        guest.ask(REQUEST, GETATTR, unique, &body, 64);
    }
    guest.events.run_with_timeout(0).unwrap();
    let start = Instant::now();
    let mut answered = 0;
    while answered < 20 {
        if let Some((header, _)) = guest.received() {
            guest.answer(&packet(header.unique, b""));
        }
        guest.events.run_with_timeout(10).unwrap();
        while guest.queues[REQUEST].used().is_some() {
            answered += 1;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{answered} answered");
    }
}

#[test]
fn strange_answers_end_their_request_or_nothing() {
    let mut guest = Guest::new();
    guest.ask(REQUEST, GETATTR, 3, b"", 64);
    guest.run();
    let unique = guest.received().unwrap().0.unique;
    guest.answer(&packet(unique + 1, b"to nobody"));
    guest.answer(b"short");
    guest.run();
    assert_eq!(guest.queues[REQUEST].used(), None);
    // This answer is longer than the guest has room for.
    guest.answer(&packet(unique, &[1; 64]));
    guest.run();
    assert_eq!(guest.queues[REQUEST].used().unwrap().1, OUT_HEADER as u32);
    assert_eq!(guest.output(16).0.error, -libc::EIO);
    // This is a second answer to the same request.
    guest.answer(&packet(unique, b""));
    guest.run();
    assert_eq!(guest.queues[REQUEST].used(), None);
}

#[test]
fn a_reset_forgets_what_was_asked() {
    let mut guest = Guest::new();
    guest.ask(REQUEST, GETATTR, 3, b"", 64);
    guest.run();
    let unique = guest.received().unwrap().0.unique;
    guest.device.lock().unwrap().reset();
    guest.run();
    guest.memory.write_slice(&[0xaa; 64], GuestAddress(OUTPUT)).unwrap();
    guest.answer(&packet(unique, b"late"));
    guest.run();
    assert_eq!(guest.output(64).1, [0xaa; 48]);
    guest.queues = [0, 1].map(|index| DriverQueue::new(&guest.memory, index as u64, QUEUE_SIZES[index]));
    guest.queues.iter_mut().for_each(|queue| queue.set_available_index(0));
    guest.activate();
    guest.ask(REQUEST, GETATTR, 4, b"", 64);
    guest.run();
    assert_ne!(guest.received().unwrap().0.unique, unique);
}

#[test]
fn a_greedy_guest_has_a_bound() {
    let mut guest = Guest::new();
    // The same chain is made available again and again.
    let head = guest.ask(REQUEST, GETATTR, 1, b"", 64);
    for _ in 0..6 {
        for _ in 0..100 {
            guest.queues[REQUEST].publish(head);
        }
        guest.queues[REQUEST].kick();
        guest.run();
    }
    assert_eq!(std::iter::from_fn(|| guest.received()).count(), MAX_IN_FLIGHT);
}

#[test]
fn a_saved_device_is_restored() {
    let mut guest = Guest::new();
    let saved = guest.device.lock().unwrap().save();
    let state: State = serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap();
    let restored = Fs::restore(&state, None).unwrap();
    assert_eq!((restored.save(), restored.state()), (state.clone(), FsState::Waiting));
    let mut tag = [0; 5];
    restored.read_config(0, &mut tag);
    assert_eq!(&tag, b"husk\0");

    assert!(matches!(
        Fs::restore(&State { version: 9, ..state }, None).err().unwrap(),
        RestoreError::Version(9)
    ));
    guest.ask(REQUEST, INIT, 1, &[0; 64], 80);
    guest.run();
    let state = guest.device.lock().unwrap().save();
    assert!(matches!(Fs::restore(&state, None).err().unwrap(), RestoreError::Session));
}

#[test]
fn tags_are_checked_and_a_device_has_one_server() {
    assert!(Fs::new(&"x".repeat(36)).is_ok());
    for tag in ["", "a b", &"x".repeat(37)] {
        assert!(matches!(Fs::new(tag), Err(FsError::Tag(_))), "{tag}");
    }
    let guest = Guest::new();
    let other = tempfile::tempfile().unwrap().into();
    assert!(matches!(guest.device.lock().unwrap().attach(other), Err(FsError::Attached)));
}

proptest! {
    #[test]
    fn no_ring_is_too_strange(
        ring in strange_rings(140),
    ) {
        let mut guest = Guest::new();
        guest.queues.iter_mut().for_each(|queue| ring.write(queue, INPUT));
        guest.run();
    }

    #[test]
    fn the_server_gets_true_lengths_or_nothing(
        len in prop_oneof![Just(None), any::<u32>().prop_map(Some)],
        opcode in 0..64_u32,
        body in prop::collection::vec(any::<u8>(), 0..200),
        room in prop_oneof![Just(0_u32), 9..200_u32],
        answer in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut guest = Guest::new();
        guest.ask(REQUEST, opcode, 1, &body, room);
        if let Some(len) = len {
            guest.memory.write_obj(len, GuestAddress(INPUT)).unwrap();
        }
        guest.run();
        let received = guest.received();
        if let Some((header, received)) = &received {
            prop_assert_eq!(header.len as usize, IN_HEADER + body.len());
            prop_assert_eq!(received, &body);
        }
        if !answer.is_empty() {
            let mut answer = answer;
            if let (Some((header, _)), Some(name)) = (received, answer.get_mut(8..16)) {
                name.copy_from_slice(&header.unique.to_le_bytes());
            }
            guest.answer(&answer);
        }
        guest.run();
    }
}
