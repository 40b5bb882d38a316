//! A tar stream (POSIX.1-2017 `pax`, with GNU's long names), read in bounded
//! memory.
//!
//! The tar crate decodes the fields of a header. This module walks the archive
//! itself, because that crate keeps long names and PAX records in memory
//! however long they claim to be, and splits records at line ends, which the
//! binary value of `security.capability` may well contain.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::sparse::{self, Part};

/// The size of a header, and the unit of which contents fill whole ones.
const BLOCK: u64 = sparse::BLOCK as u64;
/// Most bytes of long names and PAX records before one entry, as in Go's
/// `archive/tar`.
const MAX_EXTENSION: u64 = 1 << 20;
/// Most such headers before one entry.
const MAX_EXTENSIONS: u32 = 16;

/// A tar archive that is being read.
pub(super) struct Archive<R> {
    reader: R,
    /// The bytes left of the present entry's contents, with their padding.
    body: u64,
    filling: u64,
}

/// An entry. [`Archive::read`] reads its contents, until the next entry is
/// read.
pub(super) struct Entry {
    /// The header's fields.
    pub(super) header: Header,
    /// The entry's name, as it is in the archive.
    pub(super) path: Vec<u8>,
    /// The target of a link.
    pub(super) link: Vec<u8>,
    /// PAX records, in order.
    pub(super) records: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of the file, including holes.
    pub(super) size: u64,
    /// The parts of a sparse file that are stored in the contents, one after
    /// another.
    pub(super) parts: Option<Vec<Part>>,
}

impl Entry {
    /// The kind of file that the entry becomes.
    pub(super) fn kind(&self) -> EntryType {
        kind(&self.header, &self.path)
    }
}

/// The kind of an entry. Before POSIX, a folder was a file whose name ends in a
/// slash.
fn kind(header: &Header, path: &[u8]) -> EntryType {
    match header.entry_type() {
        EntryType::Regular if path.ends_with(b"/") => EntryType::Directory,
        EntryType::GNUSparse | EntryType::Continuous => EntryType::Regular,
        kind => kind,
    }
}

/// Whether contents follow a header. Some tools give links, folders and devices a size
/// but no contents, and every reader accepts that.
fn has_contents(header: &Header, path: &[u8]) -> bool {
    match kind(header, path) {
        // In POSIX, a file whose name ends in a slash is no folder.
        EntryType::Directory => header.as_old().linkflag == [b'0'],
        EntryType::Link | EntryType::Symlink | EntryType::Char | EntryType::Block | EntryType::Fifo => false,
        _ => true,
    }
}

impl<R: Read> Archive<R> {
    pub(super) const fn new(reader: R) -> Self {
        Self { reader, body: 0, filling: 0 }
    }

    /// Reads the next entry, and skips the rest of the one before.
    pub(super) fn next(&mut self) -> io::Result<Option<Entry>> {
        let (mut long_path, mut long_link, mut records) = (None, None, Vec::new());
        let mut extensions = 0;
        let mut room = MAX_EXTENSION;
        loop {
            let Some(header) = self.header()? else {
                return if extensions == 0 { Ok(None) } else { Err(invalid("it ends before an entry")) };
            };
            let kind = header.entry_type();
            if !matches!(
                kind,
                EntryType::GNULongName
                    | EntryType::GNULongLink
                    | EntryType::XHeader
                    | EntryType::XGlobalHeader
            ) {
                return self.entry(header, long_path, long_link, records).map(Some);
            }
            extensions += 1;
            let text = self.extension(&header, &mut room)?;
            if extensions > MAX_EXTENSIONS {
                return Err(invalid("too many headers before an entry"));
            }
            match kind {
                EntryType::GNULongName => long_path = Some(until_zero(text)),
                EntryType::GNULongLink => long_link = Some(until_zero(text)),
                EntryType::XHeader => parse_records(&text, &mut records)?,
                // These are comments, as `git archive` writes them.
                _ => {}
            }
        }
    }

    fn entry(
        &mut self,
        header: Header,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        records: Vec<(Vec<u8>, Vec<u8>)>,
    ) -> io::Result<Entry> {
        let record = |wanted: &[u8]| {
            let found = records.iter().rev().find(|(key, _)| key == wanted);
            found.map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
        };
        let size = match record(b"size") {
            Some(text) => std::str::from_utf8(&text)
                .ok()
                .and_then(|text| text.parse().ok())
                .ok_or_else(|| invalid("a size that is no number"))?,
            None => header.entry_size()?,
        };
        let mut path = record(b"path").or(long_path).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = record(b"linkpath")
            .or(long_link)
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
            .unwrap_or_default();
        let stored = if has_contents(&header, &path) { size } else { 0 };
        if header.entry_type() == EntryType::GNUSparse {
            let (size, parts) = sparse::old_gnu(&header, || self.block()?.ok_or_else(truncated))?;
            self.follows(stored);
            sparse::check(size, &parts, stored)?;
            return Ok(Entry { header, path, link, records, size, parts: Some(parts) });
        }
        self.follows(stored);
        let Some(file) = sparse::described(&records)? else {
            return Ok(Entry { header, path, link, records, size, parts: None });
        };
        path = file.name.unwrap_or(path);
        if kind(&header, &path) != EntryType::Regular {
            return Err(invalid("a sparse file that is not a file"));
        }
        let parts = match file.parts {
            Some(parts) => parts,
            None => sparse::in_contents(self)?,
        };
        let size = file.size.unwrap_or(size);
        sparse::check(size, &parts, self.body)?;
        Ok(Entry { header, path, link, records, size, parts: Some(parts) })
    }

    fn follows(&mut self, size: u64) {
        self.body = size;
        self.filling = size.wrapping_neg() % BLOCK;
    }

    /// Reads the next header; `None` at the end of the archive.
    fn header(&mut self) -> io::Result<Option<Header>> {
        let skipped = self.body.saturating_add(self.filling);
        if io::copy(&mut (&mut self.reader).take(skipped), &mut io::sink())? < skipped {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (self.body, self.filling) = (0, 0);
        let Some(block) = self.block()?.filter(|block| block.iter().any(|byte| *byte != 0)) else {
            return Ok(None);
        };
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(&block);
        let sum: u32 = block
            .iter()
            .enumerate()
            // The bytes of the checksum itself count as blanks.
            .map(|(index, byte)| if (148..156).contains(&index) { 32 } else { u32::from(*byte) })
            .sum();
        if header.cksum()? != sum {
            return Err(invalid("a header with a wrong checksum"));
        }
        Ok(Some(header))
    }

    /// Reads the next block; `None` at the end of the stream.
    fn block(&mut self) -> io::Result<Option<[u8; sparse::BLOCK]>> {
        let mut block = Vec::with_capacity(sparse::BLOCK);
        (&mut self.reader).take(BLOCK).read_to_end(&mut block)?;
        if block.is_empty() {
            return Ok(None);
        }
        block.try_into().map(Some).map_err(|_| truncated())
    }

    /// Reads the contents of a header that describes the next entry.
    fn extension(&mut self, header: &Header, room: &mut u64) -> io::Result<Vec<u8>> {
        let size = header.entry_size()?;
        *room = room
            .checked_sub(size)
            .ok_or_else(|| invalid("names and attributes of more than 1 MiB for one entry"))?;
        self.follows(size);
        let mut text = Vec::new();
        self.read_to_end(&mut text)?;
        Ok(text)
    }
}

impl<R: Read> Read for Archive<R> {
    /// Reads the contents of the present entry.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = (&mut self.reader).take(self.body).read(buffer)?;
        if length == 0 && self.body > 0 && !buffer.is_empty() {
            return Err(truncated());
        }
        self.body = self.body.saturating_sub(length as u64);
        Ok(length)
    }
}

/// Parses PAX records: "LENGTH KEY=VALUE\n", where the length counts all bytes
/// of the record.
fn parse_records(mut text: &[u8], records: &mut Vec<(Vec<u8>, Vec<u8>)>) -> io::Result<()> {
    let wrong = || invalid("a malformed PAX record");
    while !text.is_empty() {
        let digits = text.iter().take(20).position(|byte| *byte == b' ').ok_or_else(wrong)?;
        let (number, _) = text.split_at(digits);
        let length: usize =
            std::str::from_utf8(number).ok().and_then(|number| number.parse().ok()).ok_or_else(wrong)?;
        let (record, rest) = text.split_at_checked(length).ok_or_else(wrong)?;
        let record =
            record.get(digits + 1..).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(wrong)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
        let (key, value) = record.split_at(equals);
        records.push((key.to_vec(), value.get(1..).unwrap_or_default().to_vec()));
        text = rest;
    }
    Ok(())
}

fn until_zero(mut text: Vec<u8>) -> Vec<u8> {
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    text.truncate(end);
    text
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it is truncated")
}

pub(super) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [key.as_bytes(), b"=", value, b"\n"].concat();
        let mut length = body.len() + 2;
        while length != body.len() + 1 + length.to_string().len() {
            length = body.len() + 1 + length.to_string().len();
        }
        [length.to_string().as_bytes(), b" ", &body].concat()
    }

    fn block(kind: EntryType, name: &str, size: u64, body: &[u8]) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        let filling = vec![0; (body.len() as u64).wrapping_neg() as usize % 512];
        [header.as_bytes(), body, &filling].concat()
    }

    #[test]
    fn a_value_may_contain_line_ends_and_zeros() {
        let value = b"\x01\n\x00=\n";
        let text = [record("SCHILY.xattr.security.capability", value), record("path", b"a\nb")].concat();
        let bytes = [
            block(EntryType::XHeader, "x", text.len() as u64, &text),
            block(EntryType::Regular, "short", 2, b"hi"),
            vec![0; 1024],
        ]
        .concat();
        let mut archive = Archive::new(bytes.as_slice());
        let entry = archive.next().unwrap().unwrap();
        assert_eq!(entry.path, b"a\nb");
        assert_eq!(entry.records.first().unwrap().1, value);
        let mut body = String::new();
        archive.read_to_string(&mut body).unwrap();
        assert_eq!(body, "hi");
        assert!(archive.next().unwrap().is_none());
    }

    #[test]
    fn long_names_and_sizes_come_from_extensions() {
        let name = "n".repeat(300);
        let size = record("size", b"3");
        let bytes = [
            block(EntryType::GNULongName, "L", 301, format!("{name}\0").as_bytes()),
            block(EntryType::XHeader, "x", size.len() as u64, &size),
            block(EntryType::Regular, "short", 0, b"abc"),
            block(EntryType::Regular, "next", 0, b""),
        ]
        .concat();
        let mut archive = Archive::new(bytes.as_slice());
        let entry = archive.next().unwrap().unwrap();
        assert_eq!((entry.path, entry.size), (name.into_bytes(), 3));
        assert_eq!(archive.next().unwrap().unwrap().path, b"next", "unread contents are passed over");
    }

    #[test]
    fn a_size_without_contents_is_ignored() {
        let kinds = [EntryType::Link, EntryType::Symlink, EntryType::Char, EntryType::Block];
        for kind in kinds.into_iter().chain([EntryType::Fifo, EntryType::Directory]) {
            let bytes =
                [block(kind, "first", 4096, b""), block(EntryType::Regular, "next", 2, b"hi")].concat();
            let mut archive = Archive::new(bytes.as_slice());
            assert_eq!(archive.next().unwrap().unwrap().path, b"first");
            assert_eq!(archive.next().unwrap().unwrap().path, b"next", "{kind:?}");
        }
    }

    #[test]
    fn a_header_that_claims_gigabytes_is_refused_before_it_is_read() {
        for kind in [EntryType::XHeader, EntryType::GNULongName, EntryType::XGlobalHeader] {
            let endless = std::io::Read::chain(
                std::io::Cursor::new(block(kind, "x", 4 << 30, b"")),
                std::io::repeat(b'a'),
            );
            let error = Archive::new(endless).next().err().unwrap();
            assert!(error.to_string().contains("1 MiB"), "{error}");
        }
        let endless: Vec<u8> = block(EntryType::XGlobalHeader, "g", 0, b"").repeat(17);
        assert!(Archive::new(endless.as_slice()).next().is_err());
    }

    #[test]
    fn what_is_damaged_is_told() {
        let whole = block(EntryType::Regular, "f", 4, b"text");
        let mut flipped = whole.clone();
        if let Some(byte) = flipped.first_mut() {
            *byte ^= 1;
        }
        assert!(Archive::new(flipped.as_slice()).next().is_err());
        let mut archive = Archive::new(whole.get(..514).unwrap());
        assert!(archive.next().is_ok());
        assert!(archive.next().is_err());
        assert!(Archive::new(whole.get(..100).unwrap()).next().is_err());
        for text in ["5 a=b", "x a=b\n", "99 a=b\n", "4 ab\n", "0 ", "3 \n"] {
            assert!(parse_records(text.as_bytes(), &mut Vec::new()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_records_are_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_records(&bytes, &mut Vec::new());
        }

        #[test]
        fn records_come_back(key in "[a-zA-Z.]{1,30}", value in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut records = Vec::new();
            parse_records(&record(&key, &value), &mut records).unwrap();
            prop_assert_eq!(records, vec![(key.into_bytes(), value)]);
        }

        #[test]
        fn any_blocks_are_taken_or_refused(kind in any::<u8>(), size in any::<u64>(), body in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let bytes = block(EntryType::new(kind), "x", size & ((1 << 33) - 1), &body);
            let mut archive = Archive::new(bytes.as_slice());
            while let Ok(Some(_)) = archive.next() {}
        }
    }
}
