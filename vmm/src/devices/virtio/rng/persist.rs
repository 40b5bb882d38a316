//! The saved state of an entropy device, which is nothing but its kind.

use std::io;

use serde::{Deserialize, Serialize};

use super::device::Rng;

/// The version of [`State`].
pub const VERSION: u32 = 1;

/// A saved device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The version of the state, [`VERSION`].
    pub version: u32,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state was saved by another version.
    #[error("the rng device was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// A system call failed.
    #[error("make the rng device: {0}")]
    Io(#[from] io::Error),
}

impl Rng {
    /// Saves the state of the device itself.
    #[must_use]
    #[allow(clippy::unused_self)]
    pub const fn save(&self) -> State {
        State { version: VERSION }
    }

    /// Makes a device from its saved state.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(state: &State) -> Result<Self, RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version(state.version));
        }
        Ok(Self::new()?)
    }
}
