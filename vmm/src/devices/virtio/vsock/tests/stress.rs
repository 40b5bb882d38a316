//! Many connections at once, whose bytes are compared, with clients in threads
//! of their own and a guest that sends back the bytes that it gets.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::guest::{GUEST_BUFFER, Guest, header, read_line};
use crate::devices::virtio::vsock::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};

const CLIENTS: u32 = 12;
const BYTES: usize = 3 << 20;
/// The key that the guest combines each byte with (XOR).
const KEY: u8 = 0x5a;

/// A connection as the guest's kernel keeps it.
#[derive(Default)]
struct Echo {
    /// Bytes that the application has read, and not yet sent back.
    pending: Vec<u8>,
    received: u32,
    sent: u32,
    device_size: u32,
    device_forwarded: u32,
    announced: u32,
    host_ended: bool,
    ended: bool,
}

impl Echo {
    fn window(&self) -> usize {
        (self.device_size - self.sent.wrapping_sub(self.device_forwarded)) as usize
    }

    fn header(&mut self, host: u32, guest: u32, op: Op, len: usize) -> Header {
        // All received bytes were read, except those that are pending.
        self.announced = self.received.wrapping_sub(self.pending.len() as u32);
        Header { len: (len as u32).into(), fwd_cnt: self.announced.into(), ..header(host, guest, op) }
    }
}

/// Bytes that differ between clients and places.
fn pattern(client: u32) -> Vec<u8> {
    let mut state = client.wrapping_mul(0x9e37_79b9) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..BYTES).map(next).collect()
}

fn client(path: PathBuf, number: u32) {
    let mut stream = UnixStream::connect(path).unwrap();
    let timeout = Some(Duration::from_secs(60));
    stream.set_read_timeout(timeout).unwrap();
    stream.set_write_timeout(timeout).unwrap();
    stream.write_all(format!("CONNECT {number}\n").as_bytes()).unwrap();
    assert!(read_line(&stream).starts_with("OK "));
    let sent = pattern(number);
    let mut writer = stream.try_clone().unwrap();
    let copy = sent.clone();
    let writing = thread::spawn(move || {
        let mut rest = copy.as_slice();
        let mut size = 1;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(size.min(rest.len()));
            writer.write_all(now).unwrap();
            rest = later;
            size = (size * 7 + number as usize) % 100_000 + 1;
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    if number.is_multiple_of(3) {
        // This client is slow: the guest must wait for it.
        thread::sleep(Duration::from_millis(300));
    }
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    writing.join().unwrap();
    assert_eq!(received.len(), sent.len());
    assert!(received.iter().zip(&sent).all(|(got, sent)| *got == *sent ^ KEY), "client {number}");
}

#[test]
fn every_byte_of_many_connections_comes_back() {
    let mut guest = Guest::new();
    let path = guest.path();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let path = path.clone();
            thread::spawn(move || client(path, number))
        })
        .collect();
    let mut echoes: HashMap<(u32, u32), Echo> = HashMap::new();
    let mut resets = 0;
    let start = Instant::now();
    while resets < CLIENTS {
        assert!(start.elapsed() < Duration::from_secs(120), "it takes too long");
        let mut idle = guest.wait(0) == 0;
        while let Some(packet) = guest.take() {
            idle = false;
            let ports = (packet.header.src_port.get(), packet.header.dst_port.get());
            let (host, port) = ports;
            if packet.op() == Op::Reset {
                let echo = echoes.remove(&ports).expect("a known connection");
                assert!(echo.ended, "{ports:?}");
                resets += 1;
                continue;
            }
            let echo = echoes.entry(ports).or_default();
            echo.device_size = packet.header.buf_alloc.get();
            echo.device_forwarded = packet.header.fwd_cnt.get();
            match packet.op() {
                Op::Request => {
                    let response = echo.header(host, port, Op::Response, 0);
                    guest.send(&response, &[]);
                }
                Op::Data => {
                    echo.received = echo.received.wrapping_add(packet.header.len.get());
                    echo.pending.extend(packet.payload.iter().map(|byte| byte ^ KEY));
                    assert!(echo.pending.len() <= GUEST_BUFFER as usize, "the device overruns the guest");
                }
                Op::Shutdown => {
                    assert_eq!(packet.header.flags.get(), SHUTDOWN_SEND);
                    echo.host_ended = true;
                }
                Op::CreditRequest => {
                    let update = echo.header(host, port, Op::CreditUpdate, 0);
                    guest.send(&update, &[]);
                }
                Op::CreditUpdate => {}
                op => panic!("{op:?}"),
            }
        }
        for (&(host, port), echo) in &mut echoes {
            while guest.tx.used().is_some() {}
            if echo.ended || guest.tx.free() < 4 {
                continue;
            }
            let len = echo.window().min(echo.pending.len()).min(60_000);
            if len > 0 {
                idle = false;
                let payload: Vec<u8> = echo.pending.drain(..len).collect();
                let data = echo.header(host, port, Op::Data, len);
                echo.sent = echo.sent.wrapping_add(len as u32);
                guest.send(&data, &payload);
            } else if echo.host_ended && echo.pending.is_empty() {
                echo.ended = true;
                let shutdown =
                    Header { flags: SHUTDOWN_BOTH.into(), ..echo.header(host, port, Op::Shutdown, 0) };
                guest.send(&shutdown, &[]);
            }
        }
        if idle {
            guest.wait(10);
        }
    }
    for client in clients {
        client.join().unwrap();
    }
    guest.run();
    assert_eq!(guest.lock().muxer.connections(), 0);
}
