//! The state of a whole machine, saved so that clones continue from there.

use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{vcpu, vm};
use crate::devices::serial::SerialPortState;
use crate::devices::virtio::kinds::{Device, DeviceState};
use crate::lock;
use crate::machine::Machine;
use crate::memory;
use crate::stage::{StageError, at};

/// The version of [`MachineState`].
const VERSION: u16 = 1;
/// Most time until all disks have answered the requests that they work on.
const DISKS_WAIT: Duration = Duration::from_secs(10);

/// A saved machine. Its memory is in a file of its own.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    version: u16,
    /// The kernel's command line, which names all devices and their places.
    pub cmdline: String,
    /// The interrupt controllers and the clock.
    pub vm: vm::VmState,
    /// The vCPUs.
    pub vcpus: Vec<vcpu::VcpuState>,
    /// The serial port.
    pub serial: SerialPortState,
    /// The virtio devices, in the order of their addresses.
    pub devices: Vec<DeviceState>,
}

/// Saves the machine and ends it. Must be called on the event loop's thread, so
/// that no device but the disks is active: once the vCPUs have stopped and the
/// disks are idle, nothing changes any more.
///
/// # Errors
/// [`StageError`]; the machine cannot continue then either.
pub fn save(machine: Machine, file: &std::fs::File) -> Result<MachineState, StageError> {
    const STOP: &str = "stop vCPUs";
    let Machine { hypervisor, memory, ram, cmdline, serial, devices, transports, vcpus, .. } = machine;
    let stopped: Option<Vec<_>> = vcpus.into_iter().map(crate::vcpu::Vcpu::stop).collect();
    let stopped = stopped.ok_or_else(|| at(STOP)("one of them does not leave the guest"))?;

    let asked = Instant::now();
    let disks = || {
        devices.iter().filter_map(|device| if let Device::Block(disk) = device { Some(disk) } else { None })
    };
    while disks().map(|disk| lock(disk).rest()).filter(|rests| !rests).count() > 0 {
        if asked.elapsed() > DISKS_WAIT {
            return Err(at("let the disks come to rest")("a disk does not answer"));
        }
        thread::sleep(Duration::from_millis(1));
    }

    let save_vcpu = |fd| vcpu::save(hypervisor.kvm(), fd).map_err(at("save vCPUs"));
    let state = MachineState {
        version: VERSION,
        cmdline,
        vm: vm::save(hypervisor.vm()).map_err(at("save the VM"))?,
        vcpus: stopped.iter().map(save_vcpu).collect::<Result<_, _>>()?,
        serial: lock(&serial).save(),
        devices: devices
            .iter()
            .zip(&transports)
            .map(|(device, transport)| DeviceState { own: device.save(), transport: lock(transport).save() })
            .collect(),
    };
    memory::write(&memory, &ram, file).map_err(at("write guest memory"))?;
    Ok(state)
}

impl MachineState {
    /// Refuses a state of another version, or of a machine with another number
    /// of vCPUs.
    ///
    /// # Errors
    /// The error says in words what differs.
    pub fn check(&self, vcpus: u8) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("machine state of version {} is not supported", self.version));
        }
        if self.vcpus.len() != usize::from(vcpus) {
            return Err(format!("it was saved with {} vCPUs instead of {vcpus}", self.vcpus.len()));
        }
        Ok(())
    }
}
