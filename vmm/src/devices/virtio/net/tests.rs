//! The network device between a driver and a real tap.
#![allow(clippy::cast_possible_truncation)]

mod guest;
mod host;

use std::time::{Duration, Instant};

use husk_vmm_api::RateLimit;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use self::guest::{Guest, MAC};
use self::host::{ETHERTYPE, IPV4, Wire, in_namespace, tap};
use super::Net;
use super::persist::{RestoreError, State};
use super::tap::{HEADER_LEN, MAX_PACKET};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::rate::Limiter;

const NO_HEADER: [u8; 10] = [0; 10];

/// A frame of `len` bytes.
fn frame(number: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0; len];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    frame[12..14].copy_from_slice(&ETHERTYPE);
    for (at, byte) in frame.iter_mut().enumerate().skip(14) {
        *byte = number.wrapping_add(at as u8);
    }
    frame
}

/// A TCP segment over IPv4, with so much payload.
fn tcp(payload: usize) -> Vec<u8> {
    let mut frame = frame(1, 54 + payload);
    frame[12..14].copy_from_slice(&IPV4);
    let total = (40 + payload) as u16;
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    frame[34..54].copy_from_slice(&[0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame
}

/// A header of a packet whose checksum is to be filled in, and which is to be
/// cut into segments of 1448 bytes (TCP over IPv4).
const SEGMENTED: [u8; 10] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0];

#[test]
fn the_configuration_has_address_and_mtu() {
    in_namespace(|| {
        let net = Net::new(tap("husk0").unwrap(), MAC, 1450).unwrap();
        let mut space = [9; 14];
        net.read_config(0, &mut space);
        assert_eq!(space[..6], MAC);
        assert_eq!(space[6..], [0, 0, 0, 0, 0xaa, 5, 0, 0]);
        assert_ne!(net.features() & (1 << VIRTIO_NET_F_MTU), 0);
    });
}

#[test]
fn only_a_tap_will_do() {
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(Net::new(ours.into(), MAC, 1500).is_err());
}

#[test]
fn the_guest_sends_however_it_cuts_its_packets() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        for (number, cuts) in
            [&[1500][..], &[12], &[5, 9, 30, 800], &[12, 14], &[100, 100]].into_iter().enumerate()
        {
            let sent = frame(number as u8, 1000);
            guest.send(&[0; HEADER_LEN], &sent, cuts);
            assert_eq!(wire.receive(ETHERTYPE), (NO_HEADER, sent));
        }
        // A chain that is not a packet is used up, and the next packet is sent.
        guest.send(&[0; HEADER_LEN], &[1, 2, 3], &[4]);
        guest.send(&[0; HEADER_LEN], &vec![0; MAX_PACKET], &[5000]);
        guest.send(&[0; HEADER_LEN], &frame(9, 60), &[5000]);
        assert_eq!(wire.receive(ETHERTYPE).1, frame(9, 60));
        assert_eq!(guest.sent(), 8);
    });
}

#[test]
fn a_large_segment_leaves_the_guest_as_one() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        let sent = tcp(60_000);
        let mut header = [0; HEADER_LEN];
        header[..10].copy_from_slice(&SEGMENTED);
        guest.send(&header, &sent, &[4096]);
        let (header, received) = wire.receive(IPV4);
        assert_eq!(header[..2], [1, 1]);
        assert_eq!(received.len(), sent.len());
        assert_eq!(received[54..], sent[54..]);
    });
}

#[test]
fn the_guest_receives_in_order() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        guest.post(100, 2000);
        for number in 0..90 {
            wire.send(NO_HEADER, &frame(number, 60 + usize::from(number)));
        }
        for number in 0..90 {
            let (header, received) = guest.receive();
            assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(received, frame(number, 60 + usize::from(number)));
        }
    });
}

#[test]
fn a_packet_is_spread_over_small_buffers_and_seen_as_a_whole() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        guest.post(20, 600);
        wire.send(NO_HEADER, &frame(1, 1500));
        wire.send(NO_HEADER, &frame(2, 588));
        let (header, received) = guest.receive();
        assert_eq!((header[10], received), (3, frame(1, 1500)));
        // The packet fills its buffer to the last byte.
        let (header, received) = guest.receive();
        assert_eq!((header[10], received), (1, frame(2, 588)));
    });
}

#[test]
fn a_large_segment_reaches_a_guest_that_takes_it() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        guest.post(100, 1536);
        let sent = tcp(60_000);
        wire.send(SEGMENTED, &sent);
        let (header, received) = guest.receive();
        assert_eq!(header[..2], [1, 1]);
        assert_eq!(u16::from_le_bytes([header[10], header[11]]), 40);
        assert_eq!(received.len(), sent.len());
        assert_eq!(received[54..], sent[54..]);
    });
}

#[test]
fn a_guest_that_takes_no_large_segments_gets_small_ones() {
    in_namespace(|| {
        let without = !((1 << VIRTIO_NET_F_GUEST_TSO4) | (1 << VIRTIO_NET_F_GUEST_CSUM));
        let mut guest = Guest::new("husk0", without);
        let wire = Wire::new("husk0");
        guest.post(100, 1536);
        wire.send(SEGMENTED, &tcp(14_480));
        for _ in 0..10 {
            let (header, received) = guest.receive();
            assert_eq!((header[0], header[1]), (0, 0), "the kernel has done all of the work");
            assert_eq!(received.len(), 54 + 1448);
        }
    });
}

#[test]
fn without_buffers_packets_wait_and_the_loop_rests() {
    in_namespace(|| {
        for features in [u64::MAX, !(1 << VIRTIO_RING_F_EVENT_IDX)] {
            let mut guest = Guest::new("husk0", features);
            let wire = Wire::new("husk0");
            for number in 0..10 {
                wire.send(NO_HEADER, &frame(number, 500));
            }
            // This would not end if the tap's readiness woke the loop.
            guest.run();
            assert_eq!(guest.wait(50), 0);
            for number in 0..10 {
                guest.post(1, 600);
                assert_eq!(guest.receive().1, frame(number, 500));
            }
        }
    });
}

#[test]
fn a_packet_without_enough_buffers_is_held() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        guest.post(1, 600);
        wire.send(NO_HEADER, &frame(1, 1500));
        wire.send(NO_HEADER, &frame(2, 100));
        guest.expect_silence();
        guest.post(1, 600);
        guest.expect_silence();
        guest.post(2, 600);
        let (header, received) = guest.receive();
        assert_eq!((header[10], received), (3, frame(1, 1500)));
        assert_eq!(guest.receive().1, frame(2, 100));
    });
}

#[test]
fn a_packet_that_can_never_fit_is_dropped() {
    in_namespace(|| {
        // The driver gives one buffer for a whole packet.
        let mut guest = Guest::new("husk0", !(1 << VIRTIO_NET_F_MRG_RXBUF));
        let wire = Wire::new("husk0");
        guest.post(3, 600);
        wire.send(NO_HEADER, &frame(1, 1500));
        wire.send(NO_HEADER, &frame(2, 100));
        let (header, received) = guest.receive();
        assert_eq!((header[10], received), (1, frame(2, 100)));

        // The packet is spread over all buffers that there can be.
        let mut guest = Guest::new("husk1", u64::MAX);
        let wire = Wire::new("husk1");
        guest.post(guest::QUEUE_SIZE.into(), 20);
        wire.send(NO_HEADER, &frame(1, 6000));
        wire.send(NO_HEADER, &frame(2, 100));
        assert_eq!(guest.receive().1, frame(2, 100));
    });
}

#[test]
fn packets_that_are_dropped_do_not_keep_other_devices_waiting() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", !(1 << VIRTIO_NET_F_MRG_RXBUF));
        let wire = Wire::new("husk0");
        guest.post(1, HEADER_LEN as u32);
        guest.run();
        for number in 0..200 {
            wire.send(NO_HEADER, &frame(number, 60));
        }
        // One event is one batch.
        let mut batches = 0;
        while guest.wait(100) > 0 {
            batches += 1;
        }
        assert!(batches >= 4, "{batches}");
        guest.expect_silence();
    });
}

#[test]
fn many_packets_do_not_keep_other_devices_waiting() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        guest.post(200, 600);
        guest.run();
        for number in 0..200 {
            wire.send(NO_HEADER, &frame(number, 60));
        }
        // One event is one batch.
        guest.wait(1000);
        let mut batch = 0;
        while guest.take().is_some() {
            batch += 1;
        }
        assert_eq!(batch, 64);
        for _ in 64..200 {
            guest.receive();
        }
    });
}

#[test]
fn the_driver_is_interrupted_when_it_wants_to_be() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        guest.post(10, 600);
        guest.rx.set_used_event(2);
        for number in 0..2 {
            wire.send(NO_HEADER, &frame(number, 60));
            guest.receive();
        }
        assert_eq!(guest.interrupts(), 0);
        wire.send(NO_HEADER, &frame(3, 60));
        guest.receive();
        assert_eq!(guest.interrupts(), 1);
    });
}

#[test]
fn a_reset_device_is_as_new() {
    in_namespace(|| {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        guest.post(1, 600);
        wire.send(NO_HEADER, &frame(1, 1500));
        guest.run();
        guest.reset();
        assert!(guest.lock().activation().is_none());
        guest.run();
        guest.activate();
        guest.post(10, 2000);
        wire.send(NO_HEADER, &frame(2, 100));
        assert_eq!(guest.receive().1, frame(2, 100));
        guest.send(&[0; HEADER_LEN], &frame(3, 100), &[200]);
        assert_eq!(wire.receive(ETHERTYPE).1, frame(3, 100));
    });
}

#[test]
fn a_saved_device_is_restored() {
    in_namespace(|| {
        let net = Net::new(tap("husk0").unwrap(), MAC, 1450).unwrap();
        let saved = bitcode::serialize(&net.save()).unwrap();
        let state: State = bitcode::deserialize(&saved).unwrap();
        let restored = Net::restore(&state, tap("husk1").unwrap(), None, None).unwrap();
        assert_eq!((restored.mac, restored.mtu), (MAC, 1450));
        assert_eq!(restored.save(), net.save());
        let newer = State { version: 3, ..state };
        let error = Net::restore(&newer, tap("husk2").unwrap(), None, None).err().unwrap();
        assert!(matches!(error, RestoreError::Version(3)), "{error}");
    });
}

#[test]
fn a_limit_holds_in_its_direction_and_loses_nothing() {
    in_namespace(|| {
        // Five packets at once, then one each 20 ms.
        let limit = RateLimit { operations_per_second: 50, operations_burst: 5, ..RateLimit::default() };
        for (receives, name) in [(true, "husk0"), (false, "husk1")] {
            let limiter = |yes: bool| Limiter::new(yes.then_some(&limit));
            let change = |net: &mut Net| net.limit(limiter(receives), limiter(!receives)).unwrap();
            let mut guest = Guest::with(name, u64::MAX, change);
            let wire = Wire::new(name);
            guest.post(100, 2000);
            let start = Instant::now();
            for number in 0..15 {
                wire.send(NO_HEADER, &frame(number, 100));
            }
            for number in 0..15 {
                assert_eq!(guest.receive().1, frame(number, 100));
            }
            let received = start.elapsed();
            let start = Instant::now();
            // The packets are equal, because all are in one place of the guest's
            // memory.
            for _ in 0..15 {
                guest.send(&[0; HEADER_LEN], &frame(7, 100), &[200]);
            }
            while guest.sent() < 15 {
                guest.wait(10);
            }
            let sent = start.elapsed();
            for _ in 0..15 {
                assert_eq!(wire.receive(ETHERTYPE).1, frame(7, 100));
            }
            let (limited, free) = if receives { (received, sent) } else { (sent, received) };
            // Ten of them waited, the last one of those for 200 ms.
            assert!(limited >= Duration::from_millis(199), "{limited:?} and {free:?}");
        }
    });
}

#[test]
fn no_ring_is_too_strange() {
    let descriptor = || {
        let address =
            prop_oneof![6 => 0x10_0000..0x80_0000_u64, 1 => 0x3ff_f000..0x400_1000_u64, 1 => any::<u64>()];
        let length = prop_oneof![5 => 0..5000_u32, 1 => Just(1 << 20), 1 => any::<u32>()];
        prop::collection::vec((address, length, 0..8_u16, 0..20_u16), 16)
    };
    let heads = || prop::collection::vec(prop_oneof![9 => 0..20_u16, 1 => any::<u16>()], 0..12);
    let index = prop_oneof![5 => Just(None), 1 => any::<u16>().prop_map(Some)];
    let strategy = (descriptor(), descriptor(), heads(), heads(), index, any::<bool>());
    in_namespace(move || {
        let mut guest = Guest::new("husk0", u64::MAX);
        let wire = Wire::new("husk0");
        let config = Config { failure_persistence: None, ..Config::with_cases(128) };
        let mut runner = TestRunner::new(config);
        let cell = std::cell::RefCell::new(&mut guest);
        runner
            .run(&strategy, |(rx, tx, rx_heads, tx_heads, index, mergeable)| {
                let mut guest = cell.borrow_mut();
                guest.reset();
                guest.features = if mergeable { u64::MAX } else { !(1 << VIRTIO_NET_F_MRG_RXBUF) };
                guest.activate();
                for (number, (address, len, flags, next)) in (0..).zip(rx) {
                    guest.rx.raw_descriptor(number, address, len, flags, next);
                }
                for (number, (address, len, flags, next)) in (0..).zip(tx) {
                    guest.tx.raw_descriptor(number, address, len, flags, next);
                }
                rx_heads.into_iter().for_each(|head| guest.rx.publish(head));
                tx_heads.into_iter().for_each(|head| guest.tx.publish(head));
                if let Some(index) = index {
                    guest.rx.set_available_index(index);
                    guest.tx.set_available_index(index.wrapping_mul(3));
                }
                guest.rx.kick();
                guest.tx.kick();
                for len in [60, 1500, 5000] {
                    wire.send(NO_HEADER, &frame(1, len));
                }
                guest.run();
                Ok(())
            })
            .unwrap();
        // A driver that keeps to the rules finds a working device.
        guest.reset();
        guest.features = u64::MAX;
        guest.activate();
        guest.post(200, 2000);
        wire.send(NO_HEADER, &frame(77, 100));
        while guest.receive().1 != frame(77, 100) {
            let free = guest.rx.free();
            guest.post(free, 2000);
        }
    });
}
