//! The saved state of a file system device.

use serde::{Deserialize, Serialize};

use super::device::{Fs, FsError};
use crate::devices::virtio::rate::{Limiter, LimiterState, Throttle};

/// The version of [`State`].
pub const VERSION: u32 = 2;

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
    /// Tokens left for requests.
    pub limit: LimiterState,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state was saved by another version.
    #[error("the file system device was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// The limit was saved by another version.
    #[error("rate limits of version {0} are not supported")]
    Limits(u16),
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
        let limit = Limiter::save(self.limit.as_ref().map(Throttle::limiter));
        State { version: VERSION, tag: self.tag().to_owned(), session: self.session(), limit }
    }

    /// Makes a device from its saved state, without a server and with a limit given anew.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(state: &State, limiter: Option<Limiter>) -> Result<Self, RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version(state.version));
        }
        if state.session {
            return Err(RestoreError::Session);
        }
        let mut fs = Self::new(&state.tag)?;
        let limiter = Limiter::restore(limiter, &state.limit).map_err(RestoreError::Limits)?;
        fs.limit(limiter).map_err(FsError::Io)?;
        Ok(fs)
    }
}
