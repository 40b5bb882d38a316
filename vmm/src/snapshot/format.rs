//! The file format.
//!
//! ```text
//!  0  magic      "HUSKSNAP"
//!  8  version    u32   of this format and of all that is in the payload
//! 12  checksum   u32   CRC-32 of the payload
//! 16  length     u64   bytes of the payload
//! 24  payload    bitcode
//! ```
//!
//! All numbers are little-endian. The checksum finds damage, not malice: who
//! can write a snapshot owns the machine that is made of it. A reader takes no
//! version but its own; a snapshot that it refuses is made anew.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

const MAGIC: [u8; 8] = *b"HUSKSNAP";
const VERSION: u32 = 2;
const HEADER_LENGTH: usize = 24;
/// Longest payload: 64 vCPUs with all their registers need about 1 MiB.
const MAX_PAYLOAD: u64 = 64 << 20;

/// A snapshot cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The file's own error.
    #[error("snapshot file: {0}")]
    Io(#[from] io::Error),
    /// The file is not a snapshot.
    #[error("this is no snapshot")]
    NotASnapshot,
    /// The snapshot was written by another version.
    #[error("the snapshot has version {0}, this program reads {VERSION}; make it anew")]
    Version(u32),
    /// The payload was cut off or changed.
    #[error("the snapshot is damaged: {0}")]
    Damaged(String),
    /// The state does not fit the format.
    #[error("encode the machine's state: {0}")]
    Encode(String),
}

/// Writes `state` as a snapshot file.
///
/// # Errors
/// [`FormatError::Io`], [`FormatError::Encode`].
pub fn write<T: Serialize>(mut file: impl Write, state: &T) -> Result<(), FormatError> {
    let payload = bitcode::serialize(state).map_err(|error| FormatError::Encode(error.to_string()))?;
    if payload.len() as u64 > MAX_PAYLOAD {
        return Err(FormatError::Encode(format!("{} bytes are too many", payload.len())));
    }
    let mut header = [0u8; HEADER_LENGTH];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&crc32fast::hash(&payload).to_le_bytes());
    header[16..].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    file.write_all(&header)?;
    file.write_all(&payload)?;
    Ok(())
}

/// Reads a file that [`write`] wrote.
///
/// # Errors
/// [`FormatError`].
pub fn read<T: DeserializeOwned>(mut file: impl Read) -> Result<T, FormatError> {
    let mut header = [0u8; HEADER_LENGTH];
    file.read_exact(&mut header).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => FormatError::NotASnapshot,
        _ => error.into(),
    })?;
    let (magic, rest) = header.split_at(MAGIC.len());
    let ([version, checksum, low, high], []) = rest.as_chunks::<4>() else {
        return Err(FormatError::NotASnapshot);
    };
    if magic != MAGIC {
        return Err(FormatError::NotASnapshot);
    }
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    let length = u64::from(u32::from_le_bytes(*low)) | u64::from(u32::from_le_bytes(*high)) << 32;
    if length > MAX_PAYLOAD {
        return Err(FormatError::Damaged(format!("a length of {length} bytes")));
    }
    let mut payload = Vec::new();
    file.take(length).read_to_end(&mut payload)?;
    if payload.len() as u64 != length {
        return Err(FormatError::Damaged(format!("{} of {length} bytes are there", payload.len())));
    }
    if crc32fast::hash(&payload) != u32::from_le_bytes(*checksum) {
        return Err(FormatError::Damaged("its checksum is wrong".into()));
    }
    bitcode::deserialize(&payload).map_err(|error| FormatError::Damaged(error.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type State = (String, Vec<u64>);

    fn snapshot() -> (State, Vec<u8>) {
        let state = ("a machine".to_owned(), vec![1, 2, 3]);
        let mut file = Vec::new();
        write(&mut file, &state).unwrap();
        (state, file)
    }

    #[test]
    fn what_is_written_can_be_read() {
        let (state, file) = snapshot();
        assert_eq!(read::<State>(file.as_slice()).unwrap(), state);
    }

    #[test]
    fn another_version_is_refused_by_its_number() {
        let (_, mut file) = snapshot();
        file[8] = 7;
        assert!(matches!(read::<State>(file.as_slice()), Err(FormatError::Version(7))));
    }

    #[test]
    fn an_enormous_length_is_not_believed() {
        let (_, mut file) = snapshot();
        file[23] = 0x7f;
        assert!(matches!(read::<State>(file.as_slice()), Err(FormatError::Damaged(_))));
    }

    proptest! {
        #[test]
        fn every_change_and_every_cut_is_noticed(place: prop::sample::Index, flip in 1u8..) {
            let (_, file) = snapshot();
            let place = place.index(file.len());
            let mut changed = file.clone();
            changed[place] ^= flip;
            prop_assert!(read::<State>(changed.as_slice()).is_err());
            prop_assert!(read::<State>(&file[..place]).is_err());
        }

        #[test]
        fn random_bytes_are_no_snapshot(bytes: Vec<u8>) {
            prop_assert!(read::<State>(bytes.as_slice()).is_err());
        }
    }
}
