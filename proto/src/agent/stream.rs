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
//! An [`OutputHeader`] opens an output of a container for a client that confirms what it
//! has written to the log. The agent numbers the bytes of the stream from 0 and keeps
//! those that are not confirmed, up to a bound at which the container waits. After `OK\n`
//! the agent sends the number of the first byte that follows, eight bytes in network
//! order, and then the raw bytes: from the number that the header asks for, or from the
//! first byte that it has, if it has no such byte. The client sends the number of bytes
//! that it has written since the stream began, in the same form, as often as it likes. To a
//! client that opens the stream with a [`StreamHeader`], what was sent counts as
//! confirmed. When the stream has ended and all of it is confirmed, a connection is closed
//! after `OK\n`. An agent of a release before this header answers [`BAD_HEADER`].
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

/// The beginning of the reason with which agents of every release refuse a header that
/// they do not know.
pub const BAD_HEADER: &str = "expected `STREAM ";

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

/// The line that opens an output of a container whose client confirms what it has
/// written: `OUTPUT stdout|stderr <container id> <from>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputHeader {
    /// The stream, which is not stdin.
    pub kind: Kind,
    /// The container.
    pub container_id: String,
    /// The number of the first byte that the client does not have.
    pub from: u64,
}

/// The line that opens a connection to a port of the pod: `PORT <number>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortHeader(pub u16);

impl Kind {
    /// The stream's name, as headers and container logs have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

impl fmt::Display for OutputHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OUTPUT {} {} {}", self.kind.name(), self.container_id, self.from)
    }
}

impl FromStr for OutputHeader {
    type Err = BadHeader;

    fn from_str(line: &str) -> Result<Self, BadHeader> {
        let words: Vec<_> = line.trim_end_matches('\n').split(' ').collect();
        let ["OUTPUT", kind, container_id, from] = *words else { return Err(BadHeader) };
        let kind = match kind {
            "stdout" => Kind::Stdout,
            "stderr" => Kind::Stderr,
            _ => return Err(BadHeader),
        };
        if container_id.is_empty() {
            return Err(BadHeader);
        }
        let from = from.parse().map_err(|_| BadHeader)?;
        Ok(Self { kind, container_id: container_id.to_owned(), from })
    }
}

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
        write!(
            f,
            "{BAD_HEADER}stdin|stdout|stderr <container id> [<process id>]`, `OUTPUT stdout|stderr <container id> \
             <from>` or `PORT <number>`"
        )
    }
}

impl std::error::Error for BadHeader {}

impl fmt::Display for StreamHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "STREAM {} {}", self.kind.name(), self.container_id)?;
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
    fn an_output_reads_back_as_written_and_is_no_input() {
        let header = OutputHeader { kind: Kind::Stderr, container_id: "c0ffee".into(), from: u64::MAX };
        assert_eq!(format!("{header}\n").parse(), Ok(header));
        for line in [
            "OUTPUT stdin c 0",
            "OUTPUT stdout c",
            "OUTPUT stdout  0",
            "OUTPUT stdout c -1",
            "OUTPUT stdout c 18446744073709551616",
            "OUTPUT stdout c 0 0",
            "STREAM stdout c 0",
        ] {
            assert_eq!(line.parse::<OutputHeader>(), Err(BadHeader), "{line:?}");
        }
    }

    #[test]
    fn a_refusal_is_known_by_its_beginning() {
        assert!(BadHeader.to_string().starts_with(BAD_HEADER));
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
