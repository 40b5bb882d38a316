//! Saves and restores a block device. The transport saves the queue and the
//! registers; the disk's content is in its file.

use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::device::{Block, Kind};
use super::{Disk, IoPool, SERIAL_LENGTH};
use crate::devices::virtio::rate::{Limiter, LimiterState};
use crate::lock;

/// The version of [`BlockState`].
const VERSION: u16 = 3;

/// A saved [`Block`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    version: u16,
    serial: [u8; SERIAL_LENGTH],
    kind: Kind,
    sectors: Option<u64>,
    limiter: LimiterState,
    flush_limiter: LimiterState,
}

/// A saved block device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum BlockRestoreError {
    /// The state was saved by another version.
    #[error("block device state of version {0} is not supported")]
    Version(u16),
    /// The limit was saved by another version.
    #[error("rate limits of version {0} are not supported")]
    Limits(u16),
    /// The process has too many open files.
    #[error("make the timer of a rate limit: {0}")]
    Timer(#[from] io::Error),
    /// The guest expects a disk of another size, or none.
    #[error("the disk of {serial:?} has {found:?} sectors, but had {saved:?} when it was saved")]
    Disk {
        /// The serial number of the device.
        serial: String,
        /// Sectors of the disk that was given.
        found: Option<u64>,
        /// Sectors of the disk that the device had when it was saved.
        saved: Option<u64>,
    },
}

impl Block {
    /// Saves the device as plain data.
    #[must_use]
    pub fn save(&self) -> BlockState {
        let [limiter, flush_limiter] = self.limiters().map(Limiter::save);
        BlockState {
            version: VERSION,
            serial: *self.serial_bytes(),
            kind: self.kind(),
            sectors: self.disk().map(Disk::sectors),
            limiter,
            flush_limiter,
        }
    }

    /// Makes a device from its saved state, with a disk and limits given anew. The
    /// disk of a slot may be another one than before; the driver must then be
    /// notified.
    ///
    /// # Errors
    /// [`BlockRestoreError`].
    pub fn restore(
        state: &BlockState,
        disk: Option<Disk>,
        pool: IoPool,
        limiters: [Option<Limiter>; 2],
    ) -> Result<Arc<Mutex<Self>>, BlockRestoreError> {
        if state.version != VERSION {
            return Err(BlockRestoreError::Version(state.version));
        }
        let found = disk.as_ref().map(Disk::sectors);
        if matches!(state.kind, Kind::Fixed { .. }) && found != state.sectors {
            let serial = String::from_utf8_lossy(&state.serial).trim_end_matches('\0').to_owned();
            return Err(BlockRestoreError::Disk { serial, found, saved: state.sectors });
        }
        let [requests, flushes] = limiters;
        let requests = Limiter::restore(requests, &state.limiter).map_err(BlockRestoreError::Limits)?;
        let flushes = Limiter::restore(flushes, &state.flush_limiter).map_err(BlockRestoreError::Limits)?;
        let block = Self::build(state.serial, state.kind, disk, pool);
        lock(&block).limit(requests, flushes)?;
        Ok(block)
    }
}
