//! Pipes and terminals in the event loop.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The agent's end of a pipe or terminal, non-blocking.
pub struct AsyncFile(AsyncFd<File>);

impl AsyncFile {
    /// Registers an end for reading. No process may hold the same end, because
    /// the flag `O_NONBLOCK` belongs to it, not to this descriptor alone.
    pub fn reader(end: OwnedFd) -> io::Result<Self> {
        Self::new(end, Interest::READABLE)
    }

    /// Registers an end for writing, as [`Self::reader`] does.
    pub fn writer(end: OwnedFd) -> io::Result<Self> {
        Self::new(end, Interest::WRITABLE)
    }

    fn new(end: OwnedFd, interest: Interest) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&end, FcntlArg::F_GETFL)?);
        fcntl(&end, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: the file owns its descriptor, and neither closes nor
        // replaces it while it is registered.
        let file = unsafe { AsyncFd::register_with_interest(File::from(end), interest) }?;
        Ok(Self(file))
    }

    /// Waits for bytes, at most `limit`. The buffer is allocated only then, so
    /// that a silent stream holds none. The result is empty at the end, which a
    /// terminal signals by `EIO` once nobody has its other side open.
    pub async fn read(&self, limit: usize) -> io::Result<Vec<u8>> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut buffer = vec![0; limit];
            match ready.try_io(|file| file.get_ref().read(&mut buffer)) {
                Ok(Ok(count)) => {
                    buffer.truncate(count);
                    return Ok(buffer);
                }
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(Vec::new()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_not_ready) => {}
            }
        }
    }

    /// Writes some of `bytes`.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|file| file.get_ref().write(bytes)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(done) => return done,
                Err(_not_ready) => {}
            }
        }
    }
}
