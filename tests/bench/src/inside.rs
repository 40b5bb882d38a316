//! The work inside containers, and on the host for comparison. Both run the same program, so that a difference
//! comes from the path between them.

use std::io::{BufRead, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;

use anyhow::Context;

pub mod files;

/// The kinds of work.
#[derive(Debug, clap::Subcommand)]
pub enum Inside {
    /// Writes lines to standard output.
    Lines {
        /// MiB of lines.
        mebibytes: u64,
        /// Begins only when a line has been read from standard input, and ends when another one has been read. Not every
        /// runtime delivers a container's last output to attached clients when the container ends.
        #[arg(long)]
        wait: bool,
    },
    /// Sends and receives bytes on a TCP port, see [`Order`].
    Serve { port: u16 },
    /// Works on files in a directory, and prints the speeds as JSON.
    Files {
        folder: PathBuf,
        #[command(flatten)]
        amount: files::Amount,
    },
}

impl Inside {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Lines { mebibytes, wait } => {
                let told = || std::io::stdin().lock().read_line(&mut String::new());
                if wait {
                    told().context("read standard input")?;
                }
                lines(mebibytes, std::io::stdout().lock()).context("write lines")?;
                if wait {
                    told().context("read standard input")?;
                }
                Ok(())
            }
            Self::Serve { port } => serve(port),
            Self::Files { folder, amount } => {
                let speeds = files::measure(&folder, amount)?;
                serde_json::to_writer(std::io::stdout(), &speeds).context("print the figures")
            }
        }
    }
}

/// Bytes of a line, its newline included.
pub const LINE: usize = 128;

/// The beginning of the last line.
pub const LAST: &str = "last";

pub const MIB: u64 = 1 << 20;

/// Writes lines of [`LINE`] bytes, 64 KiB at a time.
fn lines(mebibytes: u64, mut to: impl Write) -> std::io::Result<()> {
    let mut piece = vec![b'x'; 65536];
    for line in piece.chunks_mut(LINE) {
        if let Some(end) = line.last_mut() {
            *end = b'\n';
        }
    }
    let pieces = mebibytes * MIB / piece.len() as u64;
    for number in 1..=pieces {
        if number == pieces {
            let last = piece.chunks_mut(LINE).next_back().unwrap_or_default();
            last.iter_mut().zip(LAST.bytes()).for_each(|(byte, letter)| *byte = letter);
        }
        to.write_all(&piece)?;
    }
    to.flush()
}

/// A request of a client of [`Inside::Serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The client wants that many bytes.
    Give(u64),
    /// The client sends that many bytes, and wants one byte when all have arrived.
    Take(u64),
}

impl Order {
    pub fn encode(self) -> [u8; 9] {
        let (letter, bytes) = match self {
            Self::Give(bytes) => (b'g', bytes),
            Self::Take(bytes) => (b't', bytes),
        };
        let mut message = [letter; 9];
        message[1..].copy_from_slice(&bytes.to_le_bytes());
        message
    }

    fn decode([letter, bytes @ ..]: [u8; 9]) -> Option<Self> {
        let bytes = u64::from_le_bytes(bytes);
        match letter {
            b'g' => Some(Self::Give(bytes)),
            b't' => Some(Self::Take(bytes)),
            _ => None,
        }
    }
}

fn serve(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("listen")?;
    // Whoever reads the log knows when to connect.
    println!("listening");
    for client in listener.incoming() {
        if let Err(error) = client.and_then(answer) {
            eprintln!("a client: {error}");
        }
    }
    Ok(())
}

fn answer(mut client: TcpStream) -> std::io::Result<()> {
    let mut message = [0; 9];
    client.read_exact(&mut message)?;
    match Order::decode(message) {
        Some(Order::Give(bytes)) => {
            let piece = [0; 65536];
            let mut left = bytes;
            while left > 0 {
                let length = left.min(piece.len() as u64);
                client.write_all(piece.get(..length as usize).unwrap_or(&piece))?;
                left -= length;
            }
        }
        Some(Order::Take(bytes)) => {
            let mut piece = [0; 65536];
            let mut left = bytes;
            while left > 0 {
                match client.read(&mut piece)? {
                    0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                    length => left = left.saturating_sub(length as u64),
                }
            }
            client.write_all(&[1])?;
        }
        None => return Err(std::io::ErrorKind::InvalidData.into()),
    }
    // The client closes first when it has what it wanted.
    client.read(&mut message).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn lines_have_their_length_and_the_last_one_is_marked() {
        let mut text = Vec::new();
        lines(2, &mut text).unwrap();
        assert_eq!(text.len() as u64, 2 * MIB);
        let lines: Vec<_> = text.split_inclusive(|byte| *byte == b'\n').collect();
        assert!(lines.iter().all(|line| line.len() == LINE));
        let marked: Vec<_> = (0..lines.len()).filter(|at| lines[*at].starts_with(LAST.as_bytes())).collect();
        assert_eq!(marked, [lines.len() - 1]);
    }

    #[test]
    fn orders_come_through_and_are_followed() {
        for order in [Order::Give(1 << 40), Order::Take(0)] {
            assert_eq!(Order::decode(order.encode()), Some(order));
        }
        assert_eq!(Order::decode([0; 9]), None);

        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            for client in listener.incoming().take(2) {
                answer(client.unwrap()).unwrap();
            }
        });
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(&Order::Give(100_000).encode()).unwrap();
        client.read_exact(&mut vec![0; 100_000]).unwrap();
        drop(client);
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(&Order::Take(100_000).encode()).unwrap();
        client.write_all(&vec![0; 100_000]).unwrap();
        client.read_exact(&mut [0]).unwrap();
        drop(client);
        server.join().unwrap();
    }
}
