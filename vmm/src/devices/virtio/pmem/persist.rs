//! The saved state of a persistent memory device: its range. The file behind it
//! is mapped again when guest memory is restored.

use std::io;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::device::Pmem;
use crate::memory::Range;

/// The version of [`State`].
pub const VERSION: u32 = 1;

/// A saved device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The version of the state, [`VERSION`].
    pub version: u32,
    /// The guest-physical address of the range.
    pub start: u64,
    /// The size of the range, bytes.
    pub size: u64,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state was saved by another version.
    #[error("the pmem device was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// A system call failed.
    #[error("make the pmem device: {0}")]
    Io(#[from] io::Error),
}

impl Pmem {
    /// Saves the state of the device itself.
    #[must_use]
    pub const fn save(&self) -> State {
        State { version: VERSION, start: self.range.start.0, size: self.range.size }
    }

    /// Makes a device from its saved state.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(state: &State) -> Result<Self, RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version(state.version));
        }
        Ok(Self::new(Range { start: GuestAddress(state.start), size: state.size })?)
    }
}
