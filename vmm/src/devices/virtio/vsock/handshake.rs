//! The first line of a client on the host: `CONNECT <port>\n`.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

/// Most bytes of the line, including its newline.
pub const MAX_LINE: usize = 32;

/// A client that has not finished its line.
#[derive(Debug)]
pub struct Handshake {
    /// The client's connection.
    pub socket: UnixStream,
    /// The time at which the client is given up.
    pub deadline: Instant,
    line: Vec<u8>,
}

/// The progress of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The line is not complete.
    Incomplete,
    /// The client asks for this port of the guest.
    Connect(u32),
    /// The client sent something else, or left.
    Bad,
}

impl Handshake {
    /// Makes a client that has sent nothing yet.
    #[must_use]
    pub const fn new(socket: UnixStream, deadline: Instant) -> Self {
        Self { socket, deadline, line: Vec::new() }
    }

    /// Reads the line as far as it has come, and nothing behind it: a client
    /// may send payload at once.
    pub fn read(&mut self) -> Progress {
        loop {
            let mut bytes = [0; MAX_LINE];
            let Some(room) = bytes.get_mut(self.line.len()..).filter(|room| !room.is_empty()) else {
                return Progress::Bad;
            };
            let peeked = match self.receive(room, MsgFlags::MSG_PEEK) {
                Ok(0) => return Progress::Bad,
                Ok(len) => room.get_mut(..len).unwrap_or_default(),
                Err(Errno::EAGAIN) => return Progress::Incomplete,
                Err(Errno::EINTR) => continue,
                Err(_) => return Progress::Bad,
            };
            let newline = peeked.iter().position(|&byte| byte == b'\n');
            let take = newline.map_or(peeked.len(), |at| at + 1);
            let taken = match self.receive(peeked.get_mut(..take).unwrap_or_default(), MsgFlags::empty()) {
                Ok(len) => len,
                Err(_) => return Progress::Bad,
            };
            self.line.extend_from_slice(peeked.get(..taken).unwrap_or_default());
            if self.line.last() == Some(&b'\n') {
                return parse(&self.line).map_or(Progress::Bad, Progress::Connect);
            }
        }
    }

    fn receive(&self, into: &mut [u8], flags: MsgFlags) -> nix::Result<usize> {
        recv(self.socket.as_raw_fd(), into, flags | MsgFlags::MSG_DONTWAIT)
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    // `parse` alone would allow a sign.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    fn pair() -> (Handshake, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Handshake::new(ours, Instant::now()), theirs)
    }

    #[test]
    fn a_line_may_come_in_pieces_and_with_payload_behind() {
        let (mut handshake, mut client) = pair();
        assert_eq!(handshake.read(), Progress::Incomplete);
        client.write_all(b"CONN").unwrap();
        assert_eq!(handshake.read(), Progress::Incomplete);
        client.write_all(b"ECT 1024\npayload").unwrap();
        assert_eq!(handshake.read(), Progress::Connect(1024));
        drop(client);
        let mut rest = String::new();
        handshake.socket.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "payload");
    }

    #[test]
    fn everything_else_is_bad() {
        let lines: [&[u8]; 10] = [
            b"\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT +1\n",
            b"CONNECT 1 \n",
            b"connect 1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT \xff\n",
            b"GET / HTTP/1.1\r\n",
            b"CONNECT 00000000000000000000000000000001\n",
        ];
        for line in lines {
            let (mut handshake, mut client) = pair();
            client.write_all(line).unwrap();
            assert_eq!(handshake.read(), Progress::Bad, "{}", line.escape_ascii());
        }
        let (mut handshake, client) = pair();
        drop(client);
        assert_eq!(handshake.read(), Progress::Bad);
    }

    proptest! {
        #[test]
        fn every_port_is_understood(port in any::<u32>()) {
            prop_assert_eq!(parse(format!("CONNECT {port}\n").as_bytes()), Some(port));
        }

        #[test]
        fn no_bytes_are_too_strange(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..4)) {
            let (mut handshake, mut client) = pair();
            for chunk in chunks {
                client.write_all(&chunk).unwrap();
                if handshake.read() != Progress::Incomplete {
                    break;
                }
            }
        }
    }
}
