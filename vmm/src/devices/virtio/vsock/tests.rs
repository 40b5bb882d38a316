//! The vsock device, as its driver and clients on the host see it.
#![allow(clippy::cast_possible_truncation)]

mod guest;
mod hostile;
mod stress;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use husk_vmm_api::RateLimit;
use vm_memory::{Bytes, GuestAddress};

use self::guest::{CID, Guest, header, read_line};
use super::Vsock;
use super::credit::BUFFER_SIZE;
use super::muxer::{MAX_CONNECTIONS, MAX_HANDSHAKES};
use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::persist::{RestoreError, State};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::rate::Limiter;
use crate::devices::virtio::test_utils::Part;

fn is_at_end(mut client: &UnixStream) -> bool {
    client.read(&mut [0]).unwrap() == 0
}

fn has_nothing(mut client: &UnixStream) -> bool {
    client.set_nonblocking(true).unwrap();
    let result = client.read(&mut [0]);
    client.set_nonblocking(false).unwrap();
    result.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn the_configuration_has_the_context_id() {
    let guest = Guest::new();
    let mut cid = [0; 8];
    guest.lock().read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
}

#[test]
fn a_host_client_talks_with_the_guest() {
    let mut guest = Guest::new();
    let (host, mut client) = guest.open(1024);
    client.write_all(b"ping").unwrap();
    let packet = guest.expect(Op::Data);
    assert_eq!((packet.header.src_port.get(), packet.header.dst_port.get()), (host, 1024));
    assert_eq!(packet.payload, b"ping");
    guest.say(host, 1024, Op::Data, 0, b"pong");
    let mut reply = [0; 4];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"pong");
    guest.expect_silence();
}

#[test]
fn what_the_guest_says_waits_for_its_limit_and_arrives() {
    let limit = RateLimit { operations_per_second: 20, operations_burst: 2, ..RateLimit::default() };
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("v")).unwrap();
    let mut vsock = Vsock::new(CID as u32, listener, None).unwrap();
    vsock.limit(Limiter::new(Some(&limit))).unwrap();
    let mut guest = Guest::with_device(vsock, dir);
    guest.post(64);
    let (host, mut client) = guest.open(1024);
    let start = Instant::now();
    for byte in 0..5 {
        guest.say(host, 1024, Op::Data, 0, &[byte]);
    }
    client.set_nonblocking(true).unwrap();
    let mut heard = Vec::new();
    while heard.len() < 5 {
        assert!(start.elapsed() < Duration::from_secs(20), "{heard:?}");
        guest.wait(10);
        let mut bytes = [0; 8];
        let count = client.read(&mut bytes).unwrap_or(0);
        heard.extend_from_slice(&bytes[..count]);
    }
    assert_eq!(heard, [0, 1, 2, 3, 4]);
    // The answer to the client was the first of the burst, so that four had to wait.
    assert!(start.elapsed() >= Duration::from_millis(149), "{:?}", start.elapsed());
}

#[test]
fn what_a_client_says_at_once_is_not_lost() {
    let mut guest = Guest::new();
    let mut client = UnixStream::connect(guest.path()).unwrap();
    client.write_all(b"CONNECT 7\nhello").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let host = guest.expect(Op::Request).header.src_port.get();
    guest.expect_silence();
    guest.say(host, 7, Op::Response, 0, &[]);
    assert_eq!(guest.expect(Op::Data).payload, b"hello");
    assert_eq!(guest.expect(Op::Shutdown).header.flags.get(), SHUTDOWN_SEND);
    assert_eq!(read_line(&client), format!("OK {host}"));
}

#[test]
fn a_refused_client_is_closed_without_a_word() {
    let mut guest = Guest::new();
    let (host, client) = guest.connect_from_host(1);
    guest.say(host, 1, Op::Reset, 0, &[]);
    assert!(is_at_end(&client));
    assert_eq!(guest.lock().muxer.connections(), 0);
}

#[test]
fn clients_that_leave_or_babble_are_dropped() {
    let mut guest = Guest::new();
    let (host, client) = guest.connect_from_host(1);
    drop(client);
    assert_eq!(guest.expect(Op::Reset).header.src_port.get(), host);
    let mut client = UnixStream::connect(guest.path()).unwrap();
    client.write_all(b"HELLO\n").unwrap();
    guest.run();
    assert!(is_at_end(&client));
    guest.expect_silence();
    assert_eq!(guest.lock().muxer.connections(), 0);
}

#[test]
fn the_guest_connects_to_the_port_of_the_host_once() {
    let mut guest = Guest::new();
    let mut client = guest.host_port.take().unwrap();
    guest.say(81, 5000, Op::Request, 0, &[]);
    assert_eq!(guest.expect(Op::Reset).header.src_port.get(), 81);
    guest.say(80, 5000, Op::Request, 0, &[]);
    let response = guest.expect(Op::Response);
    assert_eq!(response.header.dst_port.get(), 5000);
    assert_eq!(response.header.buf_alloc.get(), BUFFER_SIZE);
    guest.say(80, 5000, Op::Data, 0, b"from the guest");
    let mut data = [0; 14];
    client.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"from the guest");
    client.write_all(b"from the host").unwrap();
    assert_eq!(guest.expect(Op::Data).payload, b"from the host");

    // A request with the same ports again is invalid.
    guest.say(80, 5000, Op::Request, 0, &[]);
    guest.expect(Op::Reset);
    // The port accepts no second connection.
    guest.say(80, 5001, Op::Request, 0, &[]);
    assert_eq!(guest.expect(Op::Reset).header.dst_port.get(), 5001);
    assert!(is_at_end(&client));
}

#[test]
fn the_end_of_the_host_comes_behind_its_last_byte() {
    let mut guest = Guest::new();
    let (host, mut client) = guest.open(1);
    let sent = vec![7; 100_000];
    client.write_all(&sent).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut received = Vec::new();
    while received.len() < sent.len() {
        received.extend(guest.expect(Op::Data).payload);
    }
    assert_eq!(received, sent);
    assert_eq!(guest.expect(Op::Shutdown).header.flags.get(), SHUTDOWN_SEND);
    // The other direction is still open.
    guest.say(host, 1, Op::Data, 0, b"late");
    guest.say(host, 1, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"late");
    guest.expect(Op::Reset);
    assert_eq!(guest.lock().muxer.connections(), 0);
}

#[test]
fn a_client_that_closes_leaves_its_bytes() {
    let mut guest = Guest::new();
    let (host, mut client) = guest.open(1);
    client.write_all(b"last words").unwrap();
    drop(client);
    assert_eq!(guest.expect(Op::Data).payload, b"last words");
    assert_eq!(guest.expect(Op::Shutdown).header.flags.get(), SHUTDOWN_BOTH);
    // Data that nobody takes any more is no error.
    guest.say(host, 1, Op::Data, 0, b"too late");
    guest.expect_silence();
    guest.say(host, 1, Op::Reset, 0, &[]);
    guest.expect_silence();
    assert_eq!(guest.lock().muxer.connections(), 0);
}

/// Fills the socket of a client that does not read, and then the buffer.
fn fill(guest: &mut Guest, host: u32, port: u32) -> Vec<u8> {
    let mut sent = Vec::new();
    let mut forwarded = 0;
    let start = Instant::now();
    // The device reports the bytes that the socket took; the rest stays in the
    // buffer.
    loop {
        assert!(start.elapsed() < Duration::from_secs(20), "the device tells no end of its room");
        while let Some(packet) = guest.take() {
            assert_eq!(packet.op(), Op::CreditUpdate);
            forwarded = packet.header.fwd_cnt.get();
        }
        let room = BUFFER_SIZE - (sent.len() as u32 - forwarded);
        if room == 0 {
            return sent;
        }
        let first = sent.len() as u32;
        let chunk: Vec<u8> = (first..first + room.min(60_000)).map(|at| (at % 251) as u8).collect();
        guest.say(host, port, Op::Data, 0, &chunk);
        sent.extend(chunk);
        if room < 60_000 {
            guest.say(host, port, Op::CreditRequest, 0, &[]);
        }
    }
}

#[test]
fn the_end_of_the_guest_comes_behind_its_last_byte() {
    let mut guest = Guest::new();
    let (host, mut client) = guest.open(1);
    let sent = fill(&mut guest, host, 1);
    assert!(sent.len() > BUFFER_SIZE as usize);
    guest.say(host, 1, Op::Shutdown, SHUTDOWN_SEND, &[]);
    let mut received = vec![0; sent.len()];
    let mut done = 0;
    while done < received.len() {
        done += client.read(&mut received[done..]).unwrap();
        guest.run();
    }
    assert!(received == sent);
    assert!(is_at_end(&client));
    // The host can still send.
    client.write_all(b"answer").unwrap();
    loop {
        let packet = guest.receive();
        if packet.op() == Op::Data {
            break assert_eq!(packet.payload, b"answer");
        }
        assert_eq!(packet.op(), Op::CreditUpdate);
    }
    // The guest has nothing to send, and has been told once.
    guest.say(host, 1, Op::Data, 0, b"x");
    guest.expect(Op::Reset);
}

#[test]
fn a_slow_client_gets_all_of_a_guest_that_has_left() {
    for way in [Op::Shutdown, Op::Reset] {
        let mut guest = Guest::new();
        let (host, client) = guest.open(1);
        let sent = fill(&mut guest, host, 1);
        guest.say(host, 1, way, SHUTDOWN_BOTH, &[]);
        guest.expect_silence();
        if way == Op::Reset {
            // The ports are free again.
            guest.say(host, 1, Op::Data, 0, b"x");
            guest.expect(Op::Reset);
        }
        // A client that is slow to read its data must not lose the rest.
        guest.lock().muxer.tick(Instant::now() + Duration::from_secs(3600));
        guest.run();
        let mut received = Vec::new();
        let reader = std::thread::spawn(move || {
            (&client).read_to_end(&mut received).unwrap();
            received
        });
        while !reader.is_finished() {
            guest.wait(10);
        }
        assert!(reader.join().unwrap() == sent, "{way:?}");
        if way == Op::Shutdown {
            guest.expect(Op::Reset);
        }
        guest.run();
        assert_eq!(guest.lock().muxer.connections(), 0);
    }
}

#[test]
fn a_client_that_leaves_what_the_guest_left_is_not_waited_for() {
    let mut guest = Guest::new();
    let (host, client) = guest.open(1);
    fill(&mut guest, host, 1);
    guest.say(host, 1, Op::Reset, 0, &[]);
    guest.run();
    assert_eq!(guest.lock().muxer.connections(), 1);
    drop(client);
    guest.run();
    assert_eq!(guest.lock().muxer.connections(), 0);
}

#[test]
fn the_guest_cannot_overrun_the_buffer() {
    let mut guest = Guest::new();
    let (host, client) = guest.open(1);
    fill(&mut guest, host, 1);
    guest.say(host, 1, Op::Data, 0, b"x");
    guest.expect(Op::Reset);
    guest.run();
    assert_eq!(guest.lock().muxer.connections(), 0);
    drop(client);
}

#[test]
fn the_device_keeps_to_the_guests_credit() {
    let mut guest = Guest::new();
    let (host, mut client) = guest.connect_from_host(1);
    guest.send(&Header { buf_alloc: 100.into(), ..header(host, 1, Op::Response) }, &[]);
    guest.run();
    assert_eq!(read_line(&client), format!("OK {host}"));
    client.write_all(&[5; 300]).unwrap();
    assert_eq!(guest.expect(Op::Data).payload.len(), 100);
    guest.expect(Op::CreditRequest);
    guest.expect_silence();
    // The guest has no news of its credit: it is not asked again.
    guest.send(&Header { buf_alloc: 100.into(), ..header(host, 1, Op::CreditUpdate) }, &[]);
    guest.expect_silence();
    let update = Header { buf_alloc: 100.into(), fwd_cnt: 30.into(), ..header(host, 1, Op::CreditUpdate) };
    guest.send(&update, &[]);
    assert_eq!(guest.expect(Op::Data).payload.len(), 30);
    guest.expect(Op::CreditRequest);
    guest.send(&Header { buf_alloc: 1000.into(), fwd_cnt: 30.into(), ..update }, &[]);
    assert_eq!(guest.expect(Op::Data).payload.len(), 170);
    guest.expect_silence();
}

#[test]
fn a_guest_that_receives_no_more_stops_the_client() {
    let mut guest = Guest::new();
    let (host, mut client) = guest.open(1);
    guest.say(host, 1, Op::Shutdown, SHUTDOWN_RECEIVE, &[]);
    assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.expect_silence();
    guest.say(host, 1, Op::Data, 0, b"still here");
    guest.say(host, 1, Op::Shutdown, SHUTDOWN_SEND, &[]);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"still here");
    guest.expect(Op::Reset);
}

#[test]
fn packets_of_no_connection_are_reset() {
    let mut guest = Guest::new();
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        guest.say(9, 10, op, 0, &[]);
        let reset = guest.expect(Op::Reset).header;
        assert_eq!((reset.src_port.get(), reset.dst_port.get()), (9, 10));
    }
    guest.send(&Header { op: 99.into(), ..header(9, 10, Op::Data) }, &[]);
    guest.expect(Op::Reset);
    guest.send(&Header { kind: 2.into(), ..header(9, 10, Op::Request) }, &[]);
    assert_eq!(guest.expect(Op::Reset).header.kind.get(), 2);
    guest.say(9, 10, Op::Reset, 0, &[]);
    guest.send(&Header { src_cid: 43.into(), ..header(9, 10, Op::Data) }, &[]);
    guest.send(&Header { dst_cid: 1.into(), ..header(9, 10, Op::Data) }, &[]);
    guest.expect_silence();
}

#[test]
fn nonsense_ends_a_connection() {
    let nonsense: [fn(u32) -> Header; 5] = [
        |host| header(host, 1, Op::Request),
        |host| header(host, 1, Op::Response),
        |host| Header { op: 0.into(), ..header(host, 1, Op::Data) },
        |host| Header { op: 8.into(), ..header(host, 1, Op::Data) },
        // The header claims more bytes than the chain has.
        |host| Header { len: 1.into(), ..header(host, 1, Op::Data) },
    ];
    for make in nonsense {
        let mut guest = Guest::new();
        let (host, client) = guest.open(1);
        guest.send(&make(host), &[]);
        guest.expect(Op::Reset);
        assert!(is_at_end(&client));
        guest.run();
        assert_eq!(guest.lock().muxer.connections(), 0);
    }
}

#[test]
fn without_rx_buffers_nothing_is_lost() {
    let mut guest = Guest::without_buffers();
    let mut client = UnixStream::connect(guest.path()).unwrap();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.run();
    guest.post(1);
    let request = guest.expect(Op::Request);
    guest.say(request.header.src_port.get(), 1, Op::Response, 0, &[]);
    client.write_all(&vec![3; 50_000]).unwrap();
    let mut total = 0;
    while total < 50_000 {
        total += guest.expect(Op::Data).payload.len();
    }
    assert_eq!(total, 50_000);
}

#[test]
fn resets_that_nobody_takes_stop_the_guest_and_nothing_else() {
    let mut guest = Guest::without_buffers();
    let mut sent = 0;
    // Send as many as fit, until the device takes no more.
    loop {
        while guest.tx.used().is_some() {}
        if guest.tx.free() < 2 {
            break;
        }
        guest.say(sent, 1, Op::Data, 0, &[]);
        sent += 1;
        assert!(sent < 1000, "the device takes RSTs without a bound");
    }
    guest.post(16);
    for port in 0..sent {
        assert_eq!(guest.expect(Op::Reset).header.src_port.get(), port);
    }
    guest.expect_silence();
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::without_buffers();
    guest.post(4);
    let clients: Vec<(u32, UnixStream)> = (0..4).map(|port| guest.open(port)).collect();
    for (_, client) in &clients {
        (&mut &*client).write_all(&[1; 60_000]).unwrap();
    }
    let mut ports = Vec::new();
    for _ in 0..12 {
        let packet = guest.expect(Op::Data);
        ports.push(packet.header.dst_port.get());
    }
    for turn in ports[4..].chunks(4) {
        let mut turn = turn.to_vec();
        turn.sort_unstable();
        assert_eq!(turn, [0, 1, 2, 3], "{ports:?}");
    }
}

#[test]
fn clients_wait_for_a_driver_and_do_not_outlive_it() {
    let mut guest = Guest::new();
    let (host, client) = guest.open(1);
    let waiting = UnixStream::connect(guest.path()).unwrap();
    guest.run();
    guest.reset();
    guest.run();
    assert!(is_at_end(&client) && is_at_end(&waiting));
    assert!(guest.lock().activation().is_none());

    // No driver accepts it, but it can connect.
    let mut early = UnixStream::connect(guest.path()).unwrap();
    early.write_all(b"CONNECT 5\n").unwrap();
    guest.run();
    assert!(has_nothing(&early));
    guest.activate();
    guest.post(16);
    let request = guest.expect(Op::Request);
    guest.say(request.header.src_port.get(), 5, Op::Response, 0, &[]);
    assert!(read_line(&early).starts_with("OK "));
    guest.say(host, 1, Op::Data, 0, b"x");
    guest.expect(Op::Reset);
}

#[test]
fn a_reset_and_activation_in_a_row_are_a_new_start() {
    let mut guest = Guest::new();
    let (_, client) = guest.open(1);
    for _ in 0..20 {
        guest.reset();
        guest.activate();
        guest.post(16);
        guest.open(2);
    }
    assert!(is_at_end(&client));
}

#[test]
fn handshakes_are_bounded_in_number_and_time() {
    let mut guest = Guest::new();
    let idle: Vec<UnixStream> =
        (0..MAX_HANDSHAKES).map(|_| UnixStream::connect(guest.path()).unwrap()).collect();
    guest.run();
    let mut late = UnixStream::connect(guest.path()).unwrap();
    late.write_all(b"CONNECT 1\n").unwrap();
    guest.expect_silence();
    guest.lock().muxer.tick(Instant::now() + Duration::from_secs(4));
    guest.run();
    assert!(has_nothing(&idle[0]));
    guest.lock().muxer.tick(Instant::now() + Duration::from_secs(6));
    // The timer ticks while there are handshakes.
    guest.expect(Op::Request);
    assert!(idle.iter().all(is_at_end));
}

#[test]
fn a_guest_that_does_not_answer_is_given_up() {
    let mut guest = Guest::new();
    let (_, client) = guest.connect_from_host(1);
    guest.lock().muxer.tick(Instant::now() + Duration::from_secs(11));
    guest.expect(Op::Reset);
    assert!(is_at_end(&client));

    // A connection that can carry nothing does not stay for ever.
    let (_, client) = guest.open(2);
    drop(client);
    assert_eq!(guest.expect(Op::Shutdown).header.flags.get(), SHUTDOWN_BOTH);
    guest.lock().muxer.tick(Instant::now() + Duration::from_secs(11));
    guest.expect(Op::Reset);
    assert_eq!(guest.lock().muxer.connections(), 0);
}

#[test]
fn the_number_of_connections_is_bounded() {
    let mut guest = Guest::new();
    let open: Vec<_> = (0..MAX_CONNECTIONS as u32).map(|port| guest.open(port)).collect();
    guest.say(80, 5000, Op::Request, 0, &[]);
    guest.expect(Op::Reset);
    let mut client = UnixStream::connect(guest.path()).unwrap();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.expect_silence();
    assert!(is_at_end(&client));
    // A connection that ends makes room for another.
    guest.say(open[3].0, 3, Op::Reset, 0, &[]);
    guest.say(80, 5000, Op::Request, 0, &[]);
    guest.expect(Op::Response);
}

#[test]
fn a_device_without_connections_tells_the_guest_nothing() {
    let state = Guest::new().lock().save();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let restored = Vsock::restore(&state, UnixListener::bind(path).unwrap(), None).unwrap();
    let mut clone = Guest::with_device(restored, dir);
    clone.post(16);
    clone.event.add(&[Part::writable(0x10_0000, 4)]);
    clone.event.kick();
    clone.run();
    assert_eq!(clone.event.used(), None);
}

#[test]
fn a_restored_device_tells_the_guest_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    let (host, client) = guest.open(1);
    let saved = bitcode::serialize(&guest.lock().save()).unwrap();
    let state: State = bitcode::deserialize(&saved).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let restored = Vsock::restore(&state, UnixListener::bind(path).unwrap(), None).unwrap();
    assert_eq!(restored.save(), State { connected: false, ..state.clone() });
    let mut clone = Guest::with_device(restored, dir);
    clone.post(16);
    clone.event.add(&[Part::writable(0x10_0000, 4)]);
    clone.event.kick();
    clone.memory.write_obj(u32::MAX, GuestAddress(0x10_0000)).unwrap();
    clone.run();
    assert_eq!(clone.event.used().map(|(_, len)| len), Some(4));
    assert_eq!(clone.memory.read_obj::<u32>(GuestAddress(0x10_0000)).unwrap(), 0);
    clone.say(host, 1, Op::Data, 0, b"x");
    clone.expect(Op::Reset);
    drop(client);

    let refused = |name: &str, state: State| {
        let listener = UnixListener::bind(clone.dir.path().join(name)).unwrap();
        Vsock::restore(&state, listener, None).err().unwrap()
    };
    let error = refused("w", State { version: 9, ..state.clone() });
    assert!(matches!(error, RestoreError::Version(9)), "{error}");
    let error = refused("x", State { next_host_port: 1024, ..state });
    assert!(matches!(error, RestoreError::Port(1024)), "{error}");
}

#[test]
fn a_restored_device_takes_no_port_that_the_guest_may_still_be_closing() {
    let mut guest = Guest::new();
    let (host, client) = guest.open(1);
    let state = guest.lock().save();
    drop(client);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let restored = Vsock::restore(&state, UnixListener::bind(path).unwrap(), None).unwrap();
    let mut clone = Guest::with_device(restored, dir);
    clone.post(16);
    assert_eq!(clone.open(1).0, host + 1);
}
