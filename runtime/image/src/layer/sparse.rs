//! Sparse files in archives: which parts of a file are stored, and at which offsets.
//!
//! GNU tar has four formats (its manual, "Storing Sparse Files"): the map of the parts is
//! in the header and in blocks that follow it (old GNU), in PAX records (0.0 and 0.1), or
//! at the beginning of the contents (1.0).

use std::io::{self, Read};

use tar::{GnuExtSparseHeader, Header};

use super::archive::invalid;

/// Bytes of a block.
pub(super) const BLOCK: usize = 512;
/// Most blocks of a map: 1 MiB, as in Go's `archive/tar`.
const MAX_BLOCKS: usize = 2048;
/// Most digits of a number in a map.
const MAX_DIGITS: usize = 20;

/// A part of a file that is stored in the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The offset in the file.
    pub(super) offset: u64,
    /// The number of bytes.
    pub(super) length: u64,
}

/// A sparse file as PAX records describe it.
#[derive(Debug, Default)]
pub(super) struct Described {
    /// The file's real name; the entry has another one, for readers that do not know
    /// the format.
    pub(super) name: Option<Vec<u8>>,
    /// Bytes of the file, including holes.
    pub(super) size: Option<u64>,
    /// The map, unless it is at the beginning of the contents.
    pub(super) parts: Option<Vec<Part>>,
}

/// Reads the size and the map of an entry of kind `S`. `next` reads the block that
/// follows.
pub(super) fn old_gnu(
    header: &Header,
    mut next: impl FnMut() -> io::Result<[u8; BLOCK]>,
) -> io::Result<(u64, Vec<Part>)> {
    let gnu = header.as_gnu().ok_or_else(|| invalid("a sparse file in a header that is not GNU's"))?;
    let mut parts = Vec::new();
    let mut add = |found: &[tar::GnuSparseHeader]| {
        for part in found.iter().take_while(|part| !part.is_empty()) {
            parts.push(Part { offset: part.offset()?, length: part.length()? });
        }
        io::Result::Ok(())
    };
    add(&gnu.sparse)?;
    let mut more = gnu.is_extended();
    let mut blocks = 0;
    while more {
        blocks += 1;
        if blocks > MAX_BLOCKS {
            return Err(too_many());
        }
        let mut extension = GnuExtSparseHeader::new();
        extension.as_mut_bytes().copy_from_slice(&next()?);
        add(extension.sparse())?;
        more = extension.is_extended();
    }
    Ok((gnu.real_size()?, parts))
}

/// The sparse file that PAX records describe; `None` for a plain file.
pub(super) fn described(records: &[(Vec<u8>, Vec<u8>)]) -> io::Result<Option<Described>> {
    let all = |key: &'static str| {
        records.iter().filter_map(move |(found, value)| {
            let is_it = found.strip_prefix(b"GNU.sparse.") == Some(key.as_bytes());
            is_it.then_some(value.as_slice())
        })
    };
    let last = |key| all(key).next_back();
    let version = (last("major"), last("minor"));
    let mut file = Described {
        name: last("name").filter(|name| !name.is_empty()).map(<[u8]>::to_vec),
        size: last("size").or(last("realsize")).map(number).transpose()?,
        parts: None,
    };
    match version {
        (Some(b"1"), Some(b"0")) => return Ok(Some(file)),
        (None, None) | (Some(b"0"), Some(b"0" | b"1")) => {}
        _ => return Err(invalid("a sparse file of an unknown version")),
    }
    let numbers: Vec<u64> = match last("map") {
        Some(map) => map
            .split(|byte| *byte == b',')
            .filter(|text| !text.is_empty())
            .map(number)
            .collect::<io::Result<Vec<u64>>>(),
        None => {
            let pairs = all("offset").zip(all("numbytes"));
            pairs.flat_map(|(offset, length)| [offset, length]).map(number).collect::<io::Result<Vec<u64>>>()
        }
    }?;
    if numbers.is_empty() && file.size.is_none() {
        return Ok(None);
    }
    file.parts = Some(pairs(&numbers)?);
    Ok(Some(file))
}

/// Reads the map at the beginning of an entry's contents, which fills whole
/// blocks.
pub(super) fn in_contents(contents: &mut impl Read) -> io::Result<Vec<Part>> {
    let (mut numbers, mut digits) = (Vec::new(), Vec::new());
    for _ in 0..MAX_BLOCKS {
        let mut block = [0; BLOCK];
        contents.read_exact(&mut block)?;
        for byte in block {
            if byte != b'\n' {
                digits.push(byte);
                if digits.len() > MAX_DIGITS {
                    return Err(wrong());
                }
                continue;
            }
            numbers.push(number(&digits)?);
            digits.clear();
            // The first number is the count of pairs; the rest of the block is padding.
            if let Some((count, rest)) = numbers.split_first()
                && usize::try_from(*count).ok().and_then(|count| count.checked_mul(2)) == Some(rest.len())
            {
                return pairs(rest);
            }
        }
    }
    Err(too_many())
}

/// Checks that the parts are in order and inside the file, and have as many bytes
/// as are stored.
pub(super) fn check(size: u64, parts: &[Part], stored: u64) -> io::Result<()> {
    let (mut end, mut sum) = (0, 0u64);
    for part in parts {
        let after = part.offset.checked_add(part.length).filter(|after| *after <= size).ok_or_else(wrong)?;
        if part.offset < end {
            return Err(wrong());
        }
        end = after;
        sum = sum.saturating_add(part.length);
    }
    if sum == stored { Ok(()) } else { Err(wrong()) }
}

fn pairs(numbers: &[u64]) -> io::Result<Vec<Part>> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(wrong());
    }
    Ok(pairs.iter().map(|[offset, length]| Part { offset: *offset, length: *length }).collect())
}

fn number(digits: &[u8]) -> io::Result<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(wrong());
    }
    std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).ok_or_else(wrong)
}

fn wrong() -> io::Error {
    invalid("a sparse file with a malformed map")
}

fn too_many() -> io::Error {
    invalid("a sparse file with a map of more than 1 MiB")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn part(offset: u64, length: u64) -> Part {
        Part { offset, length }
    }

    fn records(records: &[(&str, &str)]) -> io::Result<Option<Described>> {
        let record = |(key, value): &(&str, &str)| {
            (format!("GNU.sparse.{key}").into_bytes(), value.as_bytes().to_vec())
        };
        described(&records.iter().map(record).collect::<Vec<_>>())
    }

    #[test]
    fn records_describe_a_file_in_three_versions() {
        let oldest = [("size", "9"), ("offset", "0"), ("numbytes", "2"), ("offset", "5"), ("numbytes", "1")];
        let file = records(&oldest).unwrap().unwrap();
        assert_eq!((file.size, file.parts), (Some(9), Some(vec![part(0, 2), part(5, 1)])));
        let file = records(&[("map", "3,4"), ("size", "9"), ("name", "a")]).unwrap().unwrap();
        assert_eq!((file.name, file.parts), (Some(b"a".to_vec()), Some(vec![part(3, 4)])));
        let newest = [("major", "1"), ("minor", "0"), ("realsize", "7")];
        let file = records(&newest).unwrap().unwrap();
        assert_eq!((file.size, file.parts), (Some(7), None));
        assert!(described(&[(b"path".to_vec(), b"x".to_vec())]).unwrap().is_none());
        for wrong in [&[("major", "2"), ("minor", "0")][..], &[("map", "1,2,3")], &[("map", "1,-2")]] {
            assert!(records(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn parts_are_in_order_and_inside_the_file() {
        check(10, &[part(0, 2), part(2, 0), part(8, 2), part(10, 0)], 4).unwrap();
        for (size, parts, stored) in [
            (10, vec![part(0, 3), part(2, 1)], 4),
            (10, vec![part(9, 2)], 2),
            (10, vec![part(u64::MAX, 2)], 2),
            (10, vec![part(0, 2)], 3),
        ] {
            assert!(check(size, &parts, stored).is_err(), "{parts:?}");
        }
    }

    proptest! {
        #[test]
        fn any_contents_are_taken_or_refused(bytes in proptest::collection::vec(
            prop_oneof![any::<u8>(), Just(b'\n'), b'0'..=b'9'], 0..2000)) {
            let _ = in_contents(&mut bytes.as_slice());
        }
    }
}
