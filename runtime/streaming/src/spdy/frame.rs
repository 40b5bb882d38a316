//! Frames, to and from bytes.
//!
//! Every frame has a head of eight bytes. What follows it is, for a data frame,
//! payload that is passed on in pieces as it comes; for a control frame, at
//! most [`MAX_CONTROL`] bytes that are read as a whole.

use bytes::{Buf, BufMut, BytesMut};

use super::header::{Block, Deflater, Inflater};

/// Length of a frame's head.
pub const HEAD: usize = 8;

/// Longest control frame that is read. The headers of a stream have a hundred
/// bytes or two.
pub const MAX_CONTROL: u32 = 16 * 1024;

/// The version in every control frame; 3.1 writes it as 3.
const VERSION: u16 = 3;

const FLAG_FIN: u8 = 1;

/// The peer does not speak SPDY/3.1 as it should.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Another version.
    #[error("SPDY: a frame of version {0}, not 3")]
    Version(u16),
    /// A control frame too long to be true.
    #[error("SPDY: a control frame of {0} bytes; at most {MAX_CONTROL} are read")]
    TooLong(u32),
    /// A control frame that ends too early, or too late.
    #[error("SPDY: a control frame of type {0} has a wrong length")]
    Length(u16),
    /// Stream 0, or one that the peer may not open.
    #[error("SPDY: stream {0} is not for the client to open now")]
    StreamId(u32),
    /// Headers that do not unpack.
    #[error("SPDY: headers: {0}")]
    Headers(&'static str),
}

/// The first eight bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Bytes of a stream.
    Data {
        /// The stream's number.
        stream: u32,
        /// These bytes are the stream's last.
        fin: bool,
        /// The number of bytes that follow.
        length: u32,
    },
    /// Anything else.
    Control {
        /// The frame's type.
        kind: u16,
        /// The frame's flags.
        flags: u8,
        /// The number of bytes that follow, at most [`MAX_CONTROL`].
        length: u32,
    },
}

impl Head {
    /// Reads a head.
    pub fn parse(bytes: [u8; HEAD]) -> Result<Self, Error> {
        let mut bytes = &bytes[..];
        let (word, rest) = (bytes.get_u32(), bytes.get_u32());
        let (flags, length) = (rest.to_be_bytes()[0], rest & 0x00ff_ffff);
        if word & 0x8000_0000 == 0 {
            return Ok(Self::Data { stream: word, fin: flags & FLAG_FIN != 0, length });
        }
        let [_, _, high, low] = word.to_be_bytes();
        let kind = u16::from_be_bytes([high, low]);
        let version = ((word >> 16) & 0x7fff) as u16;
        if version != VERSION {
            return Err(Error::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(Error::TooLong(length));
        }
        Ok(Self::Control { kind, flags, length })
    }

    /// Writes the head.
    pub fn write(self, out: &mut BytesMut) {
        match self {
            Self::Data { stream, fin, length } => {
                out.put_u32(stream & 0x7fff_ffff);
                out.put_u32(u32::from(fin) << 24 | (length & 0x00ff_ffff));
            }
            Self::Control { kind, flags, length } => {
                out.put_u16(0x8000 | VERSION);
                out.put_u16(kind);
                out.put_u32(u32::from(flags) << 24 | (length & 0x00ff_ffff));
            }
        }
    }
}

/// A control frame. Those that mean nothing here are [`Control::Other`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// A new stream.
    SynStream {
        /// The stream's number.
        stream: u32,
        /// The opener sends nothing on the stream.
        fin: bool,
        /// The purpose of the stream.
        headers: Block,
    },
    /// The answer to it.
    SynReply {
        /// The stream's number.
        stream: u32,
        /// The answerer sends nothing on it.
        fin: bool,
        /// The answerer's headers.
        headers: Block,
    },
    /// Both directions of a stream end here.
    RstStream {
        /// The stream's number.
        stream: u32,
        /// The reason's number.
        status: u32,
    },
    /// A ping, which is sent back if its id is odd, the client's.
    Ping {
        /// The number.
        id: u32,
    },
    /// The peer opens no more streams.
    GoAway {
        /// The last stream it has seen.
        last: u32,
        /// The reason's number.
        status: u32,
    },
    /// More headers of a stream.
    Headers {
        /// The stream's number.
        stream: u32,
        /// The sender sends nothing more on the stream.
        fin: bool,
        /// The headers.
        headers: Block,
    },
    /// There is room for more bytes.
    WindowUpdate {
        /// The stream's number; 0 for all together.
        stream: u32,
        /// The number of bytes.
        delta: u32,
    },
    /// SETTINGS, CREDENTIAL, and what may come.
    Other {
        /// The frame's type.
        kind: u16,
    },
}

impl Control {
    /// Status of a stream that the session has no room for.
    pub const REFUSED_STREAM: u32 = 3;
    /// Status of a stream that is not wanted any more.
    pub const CANCEL: u32 = 5;

    /// Reads a control frame, its head apart. Headers are unpacked in any case:
    /// each block builds on those before it.
    pub fn parse(kind: u16, flags: u8, mut payload: &[u8], inflater: &mut Inflater) -> Result<Self, Error> {
        let fin = flags & FLAG_FIN != 0;
        let short = Error::Length(kind);
        let mut word = || payload.try_get_u32().map_err(|_| Error::Length(kind));
        let control = match kind {
            1 => {
                let stream = word()? & 0x7fff_ffff;
                let _associated = word()?;
                // Priority and slot.
                let rest = payload.get(2..).ok_or(short)?;
                let headers = inflater.unpack(rest)?;
                if stream.is_multiple_of(2) {
                    return Err(Error::StreamId(stream));
                }
                return Ok(Self::SynStream { stream, fin, headers });
            }
            2 | 8 => {
                let stream = word()? & 0x7fff_ffff;
                let headers = inflater.unpack(payload)?;
                return Ok(match kind {
                    2 => Self::SynReply { stream, fin, headers },
                    _ => Self::Headers { stream, fin, headers },
                });
            }
            3 => Self::RstStream { stream: word()? & 0x7fff_ffff, status: word()? },
            6 => Self::Ping { id: word()? },
            7 => Self::GoAway { last: word()? & 0x7fff_ffff, status: word()? },
            9 => Self::WindowUpdate { stream: word()? & 0x7fff_ffff, delta: word()? & 0x7fff_ffff },
            kind => return Ok(Self::Other { kind }),
        };
        if payload.is_empty() { Ok(control) } else { Err(short) }
    }

    /// Writes the frame as a whole.
    pub fn write(&self, deflater: &mut Deflater, out: &mut BytesMut) -> Result<(), Error> {
        let mut payload = BytesMut::new();
        let (kind, fin) = match self {
            Self::SynStream { stream, fin, headers } => {
                payload.put_u32(*stream);
                payload.put_u32(0);
                payload.put_u16(0);
                payload.put_slice(&deflater.pack(headers)?);
                (1, *fin)
            }
            Self::SynReply { stream, fin, headers } => {
                payload.put_u32(*stream);
                payload.put_slice(&deflater.pack(headers)?);
                (2, *fin)
            }
            Self::Headers { stream, fin, headers } => {
                payload.put_u32(*stream);
                payload.put_slice(&deflater.pack(headers)?);
                (8, *fin)
            }
            Self::RstStream { stream: first, status: second } => {
                payload.put_u32(*first);
                payload.put_u32(*second);
                (3, false)
            }
            Self::GoAway { last, status } => {
                payload.put_u32(*last);
                payload.put_u32(*status);
                (7, false)
            }
            Self::WindowUpdate { stream, delta } => {
                payload.put_u32(*stream);
                payload.put_u32(*delta);
                (9, false)
            }
            Self::Ping { id } => {
                payload.put_u32(*id);
                (6, false)
            }
            Self::Other { kind } => (*kind, false),
        };
        let length = u32::try_from(payload.len()).ok().filter(|length| *length <= MAX_CONTROL);
        let length = length.ok_or(Error::Headers("more than a frame holds"))?;
        Head::Control { kind, flags: u8::from(fin), length }.write(out);
        out.put_slice(&payload);
        Ok(())
    }
}
