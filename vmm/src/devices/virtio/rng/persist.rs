//! What a saved entropy device is: nothing but its kind.

use std::io;

use serde::{Deserialize, Serialize};

use super::device::Rng;

/// Version of [`State`].
pub const VERSION: u32 = 1;

/// A saved device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`VERSION`].
    pub version: u32,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another version of this program made it.
    #[error("the rng device was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// The operating system does not play along.
    #[error("make the rng device: {0}")]
    Io(#[from] io::Error),
}

impl Rng {
    /// Saves what is the device's own.
    #[must_use]
    #[allow(clippy::unused_self)]
    pub const fn save(&self) -> State {
        State { version: VERSION }
    }

    /// Restores it.
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
