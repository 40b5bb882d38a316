//! The uncompressed bytes of a layer as they are read: hashed, counted, and cut off at the
//! limit.

use std::io::{self, Read};

use husk_base::id::hex;
use sha2::{Digest, Sha256};

/// A reader that hashes and counts.
pub(super) struct Guarded<R> {
    inner: R,
    digest: Sha256,
    /// Bytes that may still come.
    left: u64,
}

/// The layer has more bytes than an image may have.
#[derive(Debug, thiserror::Error)]
#[error("the layers unpack to more than they may")]
pub(super) struct TooLarge;

impl<R: Read> Guarded<R> {
    pub(super) fn new(inner: R, left: u64) -> Self {
        Self { inner, digest: Sha256::new(), left }
    }

    /// The digest of everything that was read.
    pub(super) fn digest(self) -> String {
        format!("sha256:{}", hex(&self.digest.finalize()))
    }
}

impl<R: Read> Read for Guarded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(length as u64).ok_or_else(|| io::Error::other(TooLarge))?;
        self.digest.update(buffer.get(..length).unwrap_or_default());
        Ok(length)
    }
}
