//! What a saved network device is.

use std::io;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::device::Net;

/// Version of [`State`].
pub const VERSION: u32 = 1;

/// A saved device. A packet on its way is lost, as on any wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`VERSION`].
    pub version: u32,
    /// Hardware address in the guest.
    pub mac: [u8; 6],
    /// Largest packet that the guest sends, bytes.
    pub mtu: u16,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another version of this program made it.
    #[error("the network device was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// The tap cannot be used.
    #[error("set up the tap: {0}")]
    Tap(#[from] io::Error),
}

impl Net {
    /// Saves what is the device's own.
    #[must_use]
    pub const fn save(&self) -> State {
        State { version: VERSION, mac: self.mac, mtu: self.mtu }
    }

    /// Restores it on another tap.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(state: &State, tap: OwnedFd) -> Result<Self, RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version(state.version));
        }
        Ok(Self::new(tap, state.mac, state.mtu)?)
    }
}
