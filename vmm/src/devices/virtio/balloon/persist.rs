//! What a saved balloon is.

use std::io;

use serde::{Deserialize, Serialize};

use super::device::Balloon;

/// Version of [`State`].
pub const VERSION: u32 = 1;

/// A saved device. Sizes are in pages of 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`VERSION`].
    pub version: u32,
    /// Pages that the host wants.
    pub wanted: u32,
    /// Pages that the guest has given.
    pub actual: u32,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another version of this program made it.
    #[error("the balloon was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// The operating system does not play along.
    #[error("make the balloon: {0}")]
    Io(#[from] io::Error),
}

impl Balloon {
    /// Saves what is the device's own.
    #[must_use]
    pub const fn save(&self) -> State {
        State { version: VERSION, wanted: self.wanted, actual: self.actual }
    }

    /// Restores it.
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
