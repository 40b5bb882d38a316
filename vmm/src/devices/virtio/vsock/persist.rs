//! The saved state of a vsock device.

use std::io;
use std::os::unix::net::UnixListener;

use serde::{Deserialize, Serialize};

use super::device::Vsock;
use super::muxer::HOST_PORTS;
use crate::devices::virtio::rate::{Limiter, LimiterState, Throttle};

/// The version of [`State`].
pub const VERSION: u32 = 4;

/// A saved device. Connections are not saved: their host sides are processes
/// that know nothing of the snapshot. A guest that had some is told that they
/// are gone when it runs again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The version of the state, [`VERSION`].
    pub version: u32,
    /// The context id of the guest.
    pub cid: u32,
    /// Whether the saved device had connections.
    pub connected: bool,
    /// The host's port of the next connection from there. The guest may still
    /// be closing connections of earlier ports.
    pub next_host_port: u32,
    /// Tokens left for sending.
    pub limit: LimiterState,
}

/// A saved device cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state was saved by another version.
    #[error("the vsock device was saved as version {0}, this program knows {VERSION}")]
    Version(u32),
    /// The limit was saved by another version.
    #[error("rate limits of version {0} are not supported")]
    Limits(u16),
    /// The port is not one for connections of the host.
    #[error("the vsock device goes on with port {0}, which is none of the host's")]
    Port(u32),
    /// A system call failed.
    #[error("make the vsock device: {0}")]
    Io(#[from] io::Error),
}

impl Vsock {
    /// Saves the state of the device itself.
    #[must_use]
    pub fn save(&self) -> State {
        State {
            version: VERSION,
            // The context id was made from a u32.
            cid: u32::try_from(self.muxer.guest_cid()).unwrap_or_default(),
            connected: self.muxer.connections() > 0,
            next_host_port: self.muxer.next_host_port(),
            limit: Limiter::save(self.limit.as_ref().map(Throttle::limiter)),
        }
    }

    /// Makes a device from its saved state, with another listener and a limit given
    /// anew. Its guest has reported itself already, and can connect to no port of the
    /// host.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(
        state: &State,
        listener: UnixListener,
        limiter: Option<Limiter>,
    ) -> Result<Self, RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version(state.version));
        }
        if !HOST_PORTS.contains(&state.next_host_port) {
            return Err(RestoreError::Port(state.next_host_port));
        }
        let mut vsock = Self::new(state.cid, listener, None)?;
        vsock.muxer.set_next_host_port(state.next_host_port);
        vsock.owes_reset_event = state.connected;
        vsock.limit(Limiter::restore(limiter, &state.limit).map_err(RestoreError::Limits)?)?;
        Ok(vsock)
    }
}
