//! Standard streams: one vsock connection each, from the host to
//! [`STREAM_PORT`](super::STREAM_PORT).
//!
//! The host opens with one line, the [`StreamHeader`]; the agent answers `OK\n`, or
//! `ERR <reason>\n` and closes. From then on the connection carries the
//! stream's raw bytes, in one direction, and ends with it: the agent closes
//! stdout after its last byte, the host half-closes stdin at its end.
//!
//! While no connection is open for an output stream, its bytes wait in the
//! container's pipe, also after the container's end, until it is removed. A
//! connection to a stream that has one already replaces it; one to a stream that
//! has ended is closed at once.
//!
//! An exec's streams belong to their first client: when it goes, they are
//! closed, and a terminal is hung up. While it is there they end when the last
//! process that has them open does, and a terminal with its first process.
//!
//! A [`PortHeader`] asks for a connection to a port of the pod instead. It is
//! answered once the pod has taken the connection or refused it; bytes then
//! travel both ways, and each way ends alone.

use std::fmt;
use std::str::FromStr;

/// Most bytes of a header, including its newline.
pub const MAX_HEADER: usize = 512;

/// One of a process's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Input: bytes for the process to read.
    Stdin,
    /// Output; with a terminal, all of it.
    Stdout,
    /// Error output; refused for a process with a terminal.
    Stderr,
}

/// The line that opens a stream: `STREAM <kind> <container id> [<process id>]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// The stream.
    pub kind: Kind,
    /// The container.
    pub container_id: String,
    /// The process's id; empty for the container's first process.
    pub process_id: String,
}

/// The line that opens a connection to a port of the pod: `PORT <number>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortHeader(pub u16);

impl fmt::Display for PortHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PORT {}", self.0)
    }
}

impl FromStr for PortHeader {
    type Err = BadHeader;

    fn from_str(line: &str) -> Result<Self, BadHeader> {
        let number = line.trim_end_matches('\n').strip_prefix("PORT ").ok_or(BadHeader)?;
        number.parse().ok().filter(|port| *port != 0).map(Self).ok_or(BadHeader)
    }
}

/// The line is not a header.
#[derive(Debug, PartialEq, Eq)]
pub struct BadHeader;

impl fmt::Display for BadHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected `STREAM stdin|stdout|stderr <container id> [<process id>]` or `PORT <number>`")
    }
}

impl std::error::Error for BadHeader {}

impl fmt::Display for StreamHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Stdin => "stdin",
            Kind::Stdout => "stdout",
            Kind::Stderr => "stderr",
        };
        write!(f, "STREAM {kind} {}", self.container_id)?;
        if !self.process_id.is_empty() {
            write!(f, " {}", self.process_id)?;
        }
        Ok(())
    }
}

impl FromStr for StreamHeader {
    type Err = BadHeader;

    fn from_str(line: &str) -> Result<Self, BadHeader> {
        let mut words = line.trim_end_matches('\n').split(' ');
        if words.next() != Some("STREAM") {
            return Err(BadHeader);
        }
        let kind = match words.next() {
            Some("stdin") => Kind::Stdin,
            Some("stdout") => Kind::Stdout,
            Some("stderr") => Kind::Stderr,
            _ => return Err(BadHeader),
        };
        let container_id = match words.next() {
            Some(id) if !id.is_empty() => id.to_owned(),
            _ => return Err(BadHeader),
        };
        let process_id = words.next().unwrap_or_default().to_owned();
        match words.next() {
            None => Ok(Self { kind, container_id, process_id }),
            Some(_) => Err(BadHeader),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_as_written() {
        for process_id in ["", "exec-1"] {
            let header = StreamHeader {
                kind: Kind::Stderr,
                container_id: "c0ffee".into(),
                process_id: process_id.into(),
            };
            assert_eq!(format!("{header}\n").parse(), Ok(header));
        }
    }

    #[test]
    fn a_port_reads_back_as_written_and_must_exist() {
        assert_eq!(format!("{}\n", PortHeader(8080)).parse(), Ok(PortHeader(8080)));
        for line in ["PORT 0", "PORT 65536", "PORT", "PORT x", "PORT 1 2", "STREAM stdin c"] {
            assert_eq!(line.parse::<PortHeader>(), Err(BadHeader), "{line:?}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for line in [
            "",
            "STREAM",
            "STREAM stdout",
            "STREAM tty c",
            "GET / HTTP",
            "STREAM stdin a b c",
            "STREAM stdin  x",
        ] {
            assert_eq!(line.parse::<StreamHeader>(), Err(BadHeader), "{line:?}");
        }
    }
}
