//! The saved state of a balloon.

use std::io;

use serde::{Deserialize, Serialize};

use super::device::Balloon;

/// The version of [`State`].
pub const VERSION: u32 = 1;

/// A saved device. Sizes are in pages of 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The version of the state, [`VERSION`].
    pub version: u32,
    /// The size that the host wants, in pages.
    pub wanted: u32,
    /// The size that the guest has reported, in pages.
    pub actual: u32,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state was saved by another version.
    #[error("the balloon was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// A system call failed.
    #[error("make the balloon: {0}")]
    Io(#[from] io::Error),
}

impl Balloon {
    /// Saves the state of the device itself.
    #[must_use]
    pub const fn save(&self) -> State {
        State { version: VERSION, wanted: self.wanted, actual: self.actual }
    }

    /// Makes a device from its saved state.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(state: &State) -> Result<Self, RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version(state.version));
        }
        let mut balloon = Self::new()?;
        balloon.wanted = state.wanted;
        balloon.actual = state.actual;
        Ok(balloon)
    }
}
