//! Reads requests and writes answers, byte for byte.

use std::ffi::CStr;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Errno;
use crate::abi::{InHeader, OutHeader};

/// Most bytes of a file name (`NAME_MAX`).
const MAX_NAME: usize = 255;

const OUT_HEADER: usize = size_of::<OutHeader>();

/// A request, parsed from its beginning to its end.
#[derive(Debug)]
pub struct Request<'a> {
    /// The header: user and group of the request, its kind, and its file.
    pub header: InHeader,
    rest: &'a [u8],
}

impl<'a> Request<'a> {
    /// Parses the request in a packet; `None` if it has no header.
    #[must_use]
    pub fn read(packet: &'a [u8]) -> Option<Self> {
        let (header, rest) = InHeader::read_from_prefix(packet).ok()?;
        Some(Self { header, rest })
    }

    /// Takes the next part, a struct.
    ///
    /// # Errors
    /// `EINVAL` when the request is too short.
    pub fn take<T: FromBytes>(&mut self) -> Result<T, Errno> {
        let (part, rest) = T::read_from_prefix(self.rest).map_err(|_| Errno::INVAL)?;
        self.rest = rest;
        Ok(part)
    }

    /// Takes the next part, a string.
    ///
    /// # Errors
    /// `EINVAL` when it does not end.
    pub fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.rest).map_err(|_| Errno::INVAL)?;
        self.rest = self.rest.get(text.count_bytes() + 1..).unwrap_or_default();
        Ok(text)
    }

    /// Takes the next part, the name of a file in a directory.
    ///
    /// # Errors
    /// `EINVAL` when the name leads out of the directory, `ENAMETOOLONG`.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }

    /// Takes the next `len` bytes.
    ///
    /// # Errors
    /// `EINVAL` when there are fewer.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.rest = rest;
        Ok(bytes)
    }
}

/// An answer that is being written, in a buffer that is used again for each.
#[derive(Debug)]
pub struct Answer<'a> {
    buffer: &'a mut Vec<u8>,
}

impl<'a> Answer<'a> {
    /// Begins an answer of success without a body.
    pub fn new(buffer: &'a mut Vec<u8>) -> Self {
        buffer.clear();
        buffer.resize(OUT_HEADER, 0);
        Self { buffer }
    }

    /// Adds a struct.
    pub fn put<T: IntoBytes + Immutable>(&mut self, part: &T) {
        self.buffer.extend_from_slice(part.as_bytes());
    }

    /// Adds bytes.
    pub fn put_bytes(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Adds zeroes up to a multiple of 8.
    pub fn align(&mut self) {
        let len = self.buffer.len().next_multiple_of(8);
        self.buffer.resize(len, 0);
    }

    /// Adds up to `len` bytes that `fill` writes; `fill` returns their number.
    ///
    /// # Errors
    /// The errors of `fill`.
    pub fn fill(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let start = self.buffer.len();
        self.buffer.resize(start + len, 0);
        let filled = fill(self.buffer.get_mut(start..).unwrap_or_default());
        self.buffer.truncate(start + *filled.as_ref().unwrap_or(&0));
        filled.map(drop)
    }

    /// Bytes of the body.
    #[must_use]
    pub fn len(&self) -> usize {
        self.buffer.len().saturating_sub(OUT_HEADER)
    }

    /// Whether the body is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the packet: header and body, or the header with the error alone.
    #[must_use]
    pub fn finish(self, unique: u64, result: Result<(), Errno>) -> &'a [u8] {
        if result.is_err() {
            self.buffer.truncate(OUT_HEADER);
        }
        let header = OutHeader {
            len: u32::try_from(self.buffer.len()).unwrap_or(u32::MAX),
            error: result.map_or_else(|errno| -errno.raw_os_error(), |()| 0),
            unique,
        };
        if let Some(place) = self.buffer.get_mut(..OUT_HEADER) {
            place.copy_from_slice(header.as_bytes());
        }
        self.buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{ForgetIn, MkdirIn};

    fn request(body: &[u8]) -> Vec<u8> {
        let header = InHeader { len: 0, opcode: 9, unique: 7, ..InHeader::default() };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn a_request_is_read_from_front_to_end() {
        let packet = request(&[&8u32.to_le_bytes()[..], &9u32.to_le_bytes(), b"dir\0rest\0"].concat());
        let mut request = Request::read(&packet).unwrap();
        let mkdir: MkdirIn = request.take().unwrap();
        assert_eq!((mkdir.mode, mkdir.umask), (8, 9));
        assert_eq!(request.name().unwrap(), c"dir");
        assert_eq!(request.text().unwrap(), c"rest");
        assert_eq!(request.take::<ForgetIn>().unwrap_err(), Errno::INVAL);
        assert!(Request::read(&packet[..39]).is_none());
    }

    #[test]
    fn names_have_one_component() {
        let long = [&[b'x'; 256][..], b"\0"].concat();
        for (body, errno) in [
            (&b"\0"[..], Errno::INVAL),
            (b".\0", Errno::INVAL),
            (b"..\0", Errno::INVAL),
            (b"../etc\0", Errno::INVAL),
            (b"/\0", Errno::INVAL),
            (b"unfinished", Errno::INVAL),
            (&long, Errno::NAMETOOLONG),
        ] {
            let packet = request(body);
            assert_eq!(Request::read(&packet).unwrap().name().unwrap_err(), errno, "{body:?}");
        }
        let packet = request(b"...\0");
        assert_eq!(Request::read(&packet).unwrap().name().unwrap(), c"...");
    }

    #[test]
    fn an_error_is_all_that_its_answer_has() {
        let mut buffer = Vec::new();
        let mut answer = Answer::new(&mut buffer);
        answer.put_bytes(b"half done");
        let packet = answer.finish(5, Err(Errno::NOENT));
        let header = OutHeader::read_from_bytes(packet).unwrap();
        assert_eq!((header.len, header.error, header.unique), (16, -2, 5));
        let mut answer = Answer::new(&mut buffer);
        answer.put_bytes(b"whole");
        answer.align();
        assert_eq!((answer.len(), answer.finish(5, Ok(())).len()), (8, 24));
    }
}
