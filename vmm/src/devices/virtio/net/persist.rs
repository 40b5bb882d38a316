//! The saved state of a network device.

use std::io;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::device::Net;
use crate::devices::virtio::rate::{Limiter, LimiterState};

/// The version of [`State`].
pub const VERSION: u32 = 2;

/// A saved device. A packet on its way is lost, as on any wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The version of the state, [`VERSION`].
    pub version: u32,
    /// The hardware address in the guest.
    pub mac: [u8; 6],
    /// Largest packet that the guest sends, bytes.
    pub mtu: u16,
    /// Tokens left for receiving.
    pub receive: LimiterState,
    /// Tokens left for sending.
    pub send: LimiterState,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state was saved by another version.
    #[error("the network device was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// The limits were saved by another version.
    #[error("rate limits of version {0} are not supported")]
    Limits(u16),
    /// The tap cannot be used.
    #[error("set up the tap: {0}")]
    Tap(#[from] io::Error),
}

impl Net {
    /// Saves the state of the device itself.
    #[must_use]
    pub fn save(&self) -> State {
        State {
            version: VERSION,
            mac: self.mac,
            mtu: self.mtu,
            receive: Limiter::save(self.limits.receive.as_ref()),
            send: Limiter::save(self.limits.send.as_ref()),
        }
    }

    /// Makes a device from its saved state, on another tap, with limits that
    /// may differ.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(
        state: &State,
        tap: OwnedFd,
        receive: Option<Limiter>,
        send: Option<Limiter>,
    ) -> Result<Self, RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version(state.version));
        }
        let mut net = Self::new(tap, state.mac, state.mtu)?;
        net.limit(
            Limiter::restore(receive, &state.receive).map_err(RestoreError::Limits)?,
            Limiter::restore(send, &state.send).map_err(RestoreError::Limits)?,
        )?;
        Ok(net)
    }
}
