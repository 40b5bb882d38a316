//! What a saved device is: where its range lies. The file behind it is mapped
//! again by whoever restores guest memory.

use std::io;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::device::Pmem;
use crate::memory::Range;

/// Version of [`State`].
pub const VERSION: u32 = 1;

/// A saved device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`VERSION`].
    pub version: u32,
    /// Guest-physical address of the range.
    pub start: u64,
    /// The size of the range, bytes.
    pub size: u64,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another version of this program made it.
    #[error("the pmem device was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// The operating system does not play along.
    #[error("make the pmem device: {0}")]
    Io(#[from] io::Error),
}

impl Pmem {
    /// Saves what is the device's own.
    #[must_use]
    pub const fn save(&self) -> State {
        State { version: VERSION, start: self.range.start.0, size: self.range.size }
    }

    /// Restores it.
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
