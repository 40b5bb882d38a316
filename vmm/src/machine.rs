//! A running machine, and the requests that it serves.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use event_manager::MutEventSubscriber;
use husk_vmm_api::{FsState, Inspection};
use vm_memory::GuestMemoryMmap;

use crate::devices::serial::SerialPort;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, BlockError, Disk};
use crate::devices::virtio::fs::{self, Fs};
use crate::devices::virtio::kinds::Device;
use crate::devices::virtio::mmio::MmioTransport;
use crate::hypervisor::Hypervisor;
use crate::lock;
use crate::memory::{self, Range};
use crate::vcpu::{Vcpu, VcpuContext};

/// A device that the event loop calls.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// A request to the machine failed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No block device has that serial number.
    #[error("there is no slot {0:?}")]
    NoSlot(String),
    /// The machine has no balloon.
    #[error("the machine has no balloon")]
    NoBalloon,
    /// The machine has no file system device.
    #[error("the machine has no file system device")]
    NoFs,
    /// The file system device refused the request.
    #[error(transparent)]
    Fs(#[from] fs::FsError),
    /// The slot refused the request.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The file cannot serve as a disk.
    #[error("open the disk: {0}")]
    Disk(#[from] std::io::Error),
}

/// A machine. Runs from when it is made until the process ends.
pub struct Machine {
    /// The VM of KVM.
    pub hypervisor: Hypervisor,
    /// Guest memory, including the memory of the root.
    pub memory: GuestMemoryMmap,
    /// The ranges of guest memory that are RAM.
    pub ram: Vec<Range>,
    /// The serial port.
    pub serial: Arc<Mutex<SerialPort>>,
    /// The kernel's command line.
    pub cmdline: String,
    /// All virtio devices, in the order of their addresses.
    pub devices: Vec<Device>,
    /// The transports of the devices, in the same order.
    pub transports: Vec<Arc<Mutex<MmioTransport>>>,
    /// The vCPUs, which run.
    pub vcpus: Vec<Vcpu>,
    /// Buses and signals that the vCPUs share.
    pub context: Arc<VcpuContext>,
}

impl Machine {
    /// Puts a disk into an empty slot.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn attach_disk(&self, slot: &str, file: OwnedFd, read_only: bool) -> Result<(), MachineError> {
        let disk = Disk::new(file, read_only)?;
        Ok(lock(self.slot(slot)?).attach(disk)?)
    }

    /// Empties a slot. Emptying an empty slot succeeds.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn detach_disk(&self, slot: &str) -> Result<(), MachineError> {
        match lock(self.slot(slot)?).detach() {
            Err(BlockError::Empty(_)) => Ok(()),
            done => Ok(done?),
        }
    }

    fn slot(&self, serial: &str) -> Result<&Mutex<Block>, MachineError> {
        self.find(|device| match device {
            Device::Block(block) if lock(block).serial() == serial => Some(&**block),
            _ => None,
        })
        .ok_or_else(|| MachineError::NoSlot(serial.to_owned()))
    }

    /// Sets the size of the balloon; the guest then returns memory, or gets it
    /// back.
    ///
    /// # Errors
    /// [`MachineError::NoBalloon`].
    pub fn set_balloon(&self, size_mib: u32) -> Result<(), MachineError> {
        lock(self.balloon().ok_or(MachineError::NoBalloon)?).set_size_mib(size_mib);
        Ok(())
    }

    /// Gives the file system device its server.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn attach_fs(&self, server: OwnedFd) -> Result<(), MachineError> {
        let device = self.fs().ok_or(MachineError::NoFs)?;
        lock(device).attach(server)?;
        fs::start(device).map_err(fs::FsError::from)?;
        Ok(())
    }

    /// The state of the file system device.
    #[must_use]
    pub fn fs_state(&self) -> FsState {
        self.fs().map_or(FsState::None, |device| lock(device).state())
    }

    /// The memory that the balloon holds, MiB.
    #[must_use]
    pub fn balloon_mib(&self) -> u32 {
        self.balloon().map_or(0, |balloon| lock(balloon).actual_mib())
    }

    /// The present state of vCPUs and devices.
    #[must_use]
    pub fn inspect(&self) -> Inspection {
        Inspection {
            vcpus: self.vcpus.iter().map(Vcpu::report).collect(),
            devices: self.transports.iter().map(|transport| lock(transport).report()).collect(),
        }
    }

    /// Open connections of the vsock device.
    #[must_use]
    pub fn connections(&self) -> usize {
        let vsock = self.find(|device| if let Device::Vsock(vsock) = device { Some(vsock) } else { None });
        vsock.map_or(0, |vsock| lock(vsock).connections())
    }

    fn balloon(&self) -> Option<&Mutex<Balloon>> {
        self.find(|device| if let Device::Balloon(balloon) = device { Some(&**balloon) } else { None })
    }

    fn fs(&self) -> Option<&Arc<Mutex<Fs>>> {
        self.find(|device| if let Device::Fs(fs) = device { Some(fs) } else { None })
    }

    /// The first device for which `pick` returns something. A machine has few
    /// devices.
    fn find<'a, T>(&'a self, pick: impl FnMut(&'a Device) -> Option<T>) -> Option<T> {
        self.devices.iter().find_map(pick)
    }

    /// When the guest was entered for the first time.
    #[must_use]
    pub fn entered(&self) -> Option<Instant> {
        self.context.entered.get().copied()
    }

    /// Bytes of guest memory that the host holds now.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        memory::resident_bytes(&self.memory, &self.ram)
    }
}
