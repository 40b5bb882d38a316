//! All kinds of virtio devices, running and saved.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::balloon::{self, Balloon};
use super::block::{Block, BlockState};
use super::fs::{self, Fs};
use super::mmio::TransportState;
use super::net::{self, Net};
use super::pmem::{self, Pmem};
use super::rng::{self, Rng};
use super::vsock::{self, Vsock};
use crate::lock;

/// A saved virtio device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceState {
    /// The state of the device itself.
    pub own: Own,
    /// The state of its registers and virtqueues.
    pub transport: TransportState,
}

/// The state of a device itself, without registers and virtqueues.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Own {
    Pmem(pmem::persist::State),
    Block(BlockState),
    Net(net::persist::State),
    Vsock(vsock::persist::State),
    Rng(rng::persist::State),
    Balloon(balloon::persist::State),
    Fs(fs::persist::State),
}

/// A virtio device of a running machine.
#[allow(missing_docs)]
pub enum Device {
    Pmem(Arc<Mutex<Pmem>>),
    Block(Arc<Mutex<Block>>),
    Net(Arc<Mutex<Net>>),
    Vsock(Arc<Mutex<Vsock>>),
    Rng(Arc<Mutex<Rng>>),
    Balloon(Arc<Mutex<Balloon>>),
    Fs(Arc<Mutex<Fs>>),
}

impl Device {
    /// Saves the state of the device itself.
    #[must_use]
    pub fn save(&self) -> Own {
        match self {
            Self::Pmem(device) => Own::Pmem(lock(device).save()),
            Self::Block(device) => Own::Block(lock(device).save()),
            Self::Net(device) => Own::Net(lock(device).save()),
            Self::Vsock(device) => Own::Vsock(lock(device).save()),
            Self::Rng(device) => Own::Rng(lock(device).save()),
            Self::Balloon(device) => Own::Balloon(lock(device).save()),
            Self::Fs(device) => Own::Fs(lock(device).save()),
        }
    }
}
