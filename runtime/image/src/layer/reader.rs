//! The unpacked bytes of a layer while they are read: hashed, counted, and cut
//! off where no honest layer goes.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};

use husk_base::id::hex;

/// What an archive's reader reads from.
pub(super) struct Guarded<'a, R> {
    inner: R,
    digest: Sha256,
    /// Bytes that may still come.
    left: u64,
    cancelled: &'a AtomicBool,
}

/// A limit was passed: the layer is at fault.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stopped {
    /// More bytes than an image may have.
    #[error("the layers unpack to more than they may")]
    TooLarge,
    /// Nobody waits for the image any more.
    #[error("the pull was given up")]
    Cancelled,
}

impl<'a, R: Read> Guarded<'a, R> {
    pub(super) fn new(inner: R, left: u64, cancelled: &'a AtomicBool) -> Self {
        Self { inner, digest: Sha256::new(), left, cancelled }
    }

    /// The digest of everything that was read.
    pub(super) fn digest(self) -> String {
        format!("sha256:{}", hex(&self.digest.finalize()))
    }
}

impl<R: Read> Read for Guarded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other(Stopped::Cancelled));
        }
        let length = self.inner.read(buffer)?;
        self.left =
            self.left.checked_sub(length as u64).ok_or_else(|| io::Error::other(Stopped::TooLarge))?;
        self.digest.update(buffer.get(..length).unwrap_or_default());
        Ok(length)
    }
}
