//! Headers of a stream: names and values, compressed with zlib, each block of a
//! connection building on the ones before.

use bytes::{Buf, BufMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;
use super::frame::Error;

/// Longest block, unpacked. A few compressed bytes can stand for a great many.
const MAX_BLOCK: usize = 32 * 1024;

/// Most headers in it.
const MAX_HEADERS: u32 = 128;

/// Bytes unpacked or packed at a time.
const STEP: usize = 1024;

/// Names, in lower case, and values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block(pub Vec<(String, String)>);

impl Block {
    /// The value of a header.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    fn parse(mut bytes: &[u8]) -> Result<Self, Error> {
        let count = bytes.try_get_u32().map_err(|_| Error::Headers("cut short"))?;
        if count > MAX_HEADERS {
            return Err(Error::Headers("too many"));
        }
        let mut headers = Vec::new();
        for _ in 0..count {
            let name = text(&mut bytes)?;
            headers.push((name, text(&mut bytes)?));
        }
        if bytes.is_empty() { Ok(Self(headers)) } else { Err(Error::Headers("more bytes than headers")) }
    }

    fn write(&self) -> Result<Vec<u8>, Error> {
        let length = |length: usize| u32::try_from(length).map_err(|_| Error::Headers("too long"));
        let mut bytes = Vec::new();
        bytes.put_u32(length(self.0.len())?);
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            bytes.put_u32(length(text.len())?);
            bytes.put_slice(text.as_bytes());
        }
        Ok(bytes)
    }
}

fn text(bytes: &mut &[u8]) -> Result<String, Error> {
    let length = bytes.try_get_u32().map_err(|_| Error::Headers("cut short"))?;
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let (text, rest) = bytes.split_at_checked(length).ok_or(Error::Headers("cut short"))?;
    *bytes = rest;
    String::from_utf8(text.to_vec()).map_err(|_| Error::Headers("not UTF-8"))
}

/// Unpacks the blocks of a connection, in their order.
#[derive(Debug)]
pub struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Inflater {
    /// Unpacks one.
    pub fn unpack(&mut self, mut packed: &[u8]) -> Result<Block, Error> {
        let mut block = Vec::new();
        loop {
            if block.len() >= MAX_BLOCK {
                return Err(Error::Headers("too long"));
            }
            block.reserve_exact(STEP);
            let (before, room) = (self.0.total_in(), block.capacity());
            let status = match self.0.decompress_vec(packed, &mut block, FlushDecompress::Sync) {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&DICTIONARY).map_err(|_| Error::Headers("another dictionary"))?;
                    Status::Ok
                }
                Err(_) => return Err(Error::Headers("not zlib's")),
                Ok(status) => status,
            };
            let consumed = usize::try_from(self.0.total_in().saturating_sub(before)).unwrap_or(usize::MAX);
            packed = packed.get(consumed..).unwrap_or_default();
            match status {
                Status::StreamEnd => return Err(Error::Headers("ended for good")),
                // Nothing is left, in the frame or inside zlib.
                _ if packed.is_empty() && block.len() < room => return Block::parse(&block),
                Status::BufError if block.len() < room => return Err(Error::Headers("not zlib's")),
                _ => {}
            }
        }
    }
}

/// Packs the blocks of a connection, in their order.
#[derive(Debug, Default)]
pub struct Deflater(Option<Compress>);

impl Deflater {
    /// Packs one.
    pub fn pack(&mut self, block: &Block) -> Result<Vec<u8>, Error> {
        let bytes = block.write()?;
        let zlib = match &mut self.0 {
            Some(zlib) => zlib,
            // A quarter of a megabyte, which a side that sends no headers spares.
            none => {
                let mut zlib = Compress::new(Compression::best(), true);
                zlib.set_dictionary(&DICTIONARY).map_err(|_| Error::Headers("cannot be packed"))?;
                none.insert(zlib)
            }
        };
        let mut rest = bytes.as_slice();
        let mut packed = Vec::new();
        loop {
            packed.reserve(STEP);
            let before = zlib.total_in();
            let room = packed.capacity();
            zlib.compress_vec(rest, &mut packed, FlushCompress::Sync)
                .map_err(|_| Error::Headers("cannot be packed"))?;
            let consumed = usize::try_from(zlib.total_in().saturating_sub(before)).unwrap_or(usize::MAX);
            rest = rest.get(consumed..).unwrap_or_default();
            // Room left over: zlib has nothing more to say.
            if rest.is_empty() && packed.len() < room {
                return Ok(packed);
            }
        }
    }
}
