//! The saved state of a file system device.

use serde::{Deserialize, Serialize};

use super::device::{Fs, FsError};

/// The version of [`State`].
pub const VERSION: u32 = 1;

/// A saved device. Its server is not saved: a restored device waits for another
/// one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The version of the state, [`VERSION`].
    pub version: u32,
    /// The tag by which the guest knows the device.
    pub tag: String,
    /// Whether the guest had begun a session with its server.
    pub session: bool,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state was saved by another version.
    #[error("the file system device was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// The guest holds names of files that no other server knows.
    #[error(
        "the guest had its file system device mounted when it was saved: save it before its first volume"
    )]
    Session,
    /// The device cannot be made.
    #[error(transparent)]
    Fs(#[from] FsError),
}

impl Fs {
    /// Saves the state of the device itself.
    #[must_use]
    pub fn save(&self) -> State {
        State { version: VERSION, tag: self.tag().to_owned(), session: self.session() }
    }

    /// Makes a device from its saved state, without a server.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(state: &State) -> Result<Self, RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version(state.version));
        }
        if state.session {
            return Err(RestoreError::Session);
        }
        Ok(Self::new(&state.tag)?)
    }
}
