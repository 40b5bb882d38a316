//! Guests that do not keep to the rules: the device must not panic, spin, or
//! write where it must not.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::guest::{CID, Guest, HOST_PORT, header};
use crate::devices::virtio::vsock::packet::{HOST_CID, Header, Op};

fn any_header() -> impl Strategy<Value = Header> {
    let cid = prop_oneof![8 => Just(CID), 1 => any::<u64>()];
    let length = prop_oneof![4 => 0..200_u32, 1 => any::<u32>()];
    let size = prop_oneof![3 => Just(1 << 18), 1 => 0..100_u32, 1 => any::<u32>()];
    let kind = prop_oneof![9 => Just(1_u16), 1 => any::<u16>()];
    let op = prop_oneof![9 => 1..8_u16, 1 => any::<u16>()];
    (cid, 0..4_u32, 0..3_u32, length, kind, op, 0..4_u32, size, 0..300_u32).prop_map(
        |(cid, host, guest, len, kind, op, flags, size, forwarded)| Header {
            src_cid: cid.into(),
            dst_cid: HOST_CID.into(),
            // The first client gets 2^30.
            dst_port: [HOST_PORT, 1, 1 << 30, (1 << 30) + 1][host as usize].into(),
            src_port: guest.into(),
            len: len.into(),
            kind: kind.into(),
            op: op.into(),
            flags: flags.into(),
            buf_alloc: size.into(),
            fwd_cnt: forwarded.into(),
        },
    )
}

#[derive(Clone, Debug)]
enum Step {
    /// A packet with so many bytes behind its header.
    Packet(Header, usize),
    /// A client connects to a port of the guest, and writes.
    Client(u32, usize),
    /// The oldest client leaves.
    Leave,
    /// The device's deadlines pass.
    Tick,
    Reset,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (any_header(), 0..300_usize).prop_map(|(header, len)| Step::Packet(header, len)),
        3 => (0..3_u32, 0..500_usize).prop_map(|(port, len)| Step::Client(port, len)),
        1 => Just(Step::Leave),
        1 => Just(Step::Tick),
        1 => Just(Step::Reset),
    ]
}

/// A descriptor: address, length, flags, next.
fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address =
        prop_oneof![6 => 0x10_0000..0x80_0000_u64, 1 => 0x3ff_f000..0x400_1000_u64, 1 => any::<u64>()];
    let length = prop_oneof![5 => 0..5000_u32, 1 => Just(1 << 20), 1 => any::<u32>()];
    (address, length, 0..8_u16, 0..20_u16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_sequence_of_packets_is_too_strange(steps in prop::collection::vec(any_step(), 1..60)) {
        use std::io::Write;
        use std::os::unix::net::UnixStream;
        let mut guest = Guest::new();
        let mut clients: Vec<_> = guest.host_port.take().into_iter().collect();
        for step in steps {
            match step {
                Step::Packet(header, len) => guest.send(&header, &vec![1; len]),
                Step::Client(port, len) => {
                    let mut client = UnixStream::connect(guest.path()).unwrap();
                    client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
                    client.write_all(&vec![2; len]).unwrap();
                    clients.push(client);
                }
                Step::Leave => drop((!clients.is_empty()).then(|| clients.remove(0))),
                Step::Tick => {
                    let later = std::time::Instant::now() + std::time::Duration::from_secs(100);
                    guest.lock().muxer.tick(later);
                }
                Step::Reset => {
                    guest.reset();
                    guest.activate();
                    guest.post(64);
                }
            }
            guest.run();
            while guest.take().is_some() {}
        }
        // The device must still work.
        drop(clients);
        guest.run();
        guest.lock().muxer.tick(std::time::Instant::now() + std::time::Duration::from_secs(100));
        guest.run();
        while guest.take().is_some() { guest.run(); }
        guest.say(77, 77, Op::Data, 0, &[]);
        let reset = loop {
            let packet = guest.receive();
            if packet.header.src_port.get() == 77 { break packet; }
        };
        prop_assert_eq!(reset.op(), Op::Reset);
    }

    #[test]
    fn no_ring_is_too_strange(
        rx in prop::collection::vec(any_descriptor(), 16),
        tx in prop::collection::vec(any_descriptor(), 16),
        rx_heads in prop::collection::vec(0..20_u16, 0..12),
        tx_heads in prop::collection::vec(prop_oneof![9 => 0..20_u16, 1 => any::<u16>()], 0..12),
        index in prop_oneof![5 => Just(None), 1 => any::<u16>().prop_map(Some)],
        packets in prop::collection::vec(any_header(), 8),
    ) {
        let mut guest = Guest::without_buffers();
        let mut at = 0x10_0000;
        for packet in packets {
            guest.memory.write_slice(packet.as_bytes(), GuestAddress(at)).unwrap();
            at += 0x1000;
        }
        for (number, (address, len, flags, next)) in (0..).zip(rx) {
            guest.rx.raw_descriptor(number, address, len, flags, next);
        }
        for (number, (address, len, flags, next)) in (0..).zip(tx) {
            let address = if number < 8 { 0x10_0000 + u64::from(number) * 0x1000 } else { address };
            guest.tx.raw_descriptor(number, address, len, flags, next);
        }
        for head in rx_heads {
            guest.rx.publish(head);
        }
        for head in tx_heads {
            guest.tx.publish(head);
        }
        if let Some(index) = index {
            guest.rx.set_available_index(index);
            guest.tx.set_available_index(index.wrapping_mul(3));
        }
        guest.rx.kick();
        guest.tx.kick();
        guest.run();
    }
}

#[test]
fn a_ring_index_from_nowhere_does_not_make_the_device_spin() {
    let mut guest = Guest::without_buffers();
    guest.tx.set_available_index(40_000);
    guest.rx.set_available_index(40_000);
    guest.tx.kick();
    guest.run();
    // The queue works again when the driver writes a valid index.
    guest.tx.set_available_index(0);
    guest.rx.set_available_index(0);
    guest.post(4);
    guest.send(&header(1, 2, Op::Data), &[]);
    guest.expect(Op::Reset);
}
