//! Builds a machine from a request to boot, stage by stage.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use husk_vmm_api::{FdIndex, TemplateConfig, VmConfig};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryMmap;

use crate::arch::x86_64::layout::MAX_VCPUS;
use crate::arch::x86_64::{boot, cpuid, mptable, msr, regs};
use crate::console::Console;
use crate::devices::virtio::rate::Limiter;
use crate::exit::ExitSignal;
use crate::hypervisor::Hypervisor;
use crate::machine::{Machine, Subscriber};
use crate::snapshot::machine::MachineState;
use crate::stage::{StageError, at};
use crate::vcpu::{Vcpu, VcpuContext};
use crate::{kernel, memory, snapshot};

mod devices;

use devices::Devices;

/// The beginning of every guest's command line.
///
/// - `quiet`: every character on the serial port costs an exit from the guest.
/// - `reboot=k`: a reset goes through the keyboard controller, see
///   [`husk_vmm_api::SHUTDOWN_MARKER`].
/// - `panic=-1`: a panic resets the machine at once.
/// - `swiotlb=noforce`: devices reach all of memory, so a guest with more than 4
///   GiB needs no 64 MiB of bounce buffers.
///
/// The rest names the root and the init program. The files of the root are used
/// where they lie in persistent memory (DAX).
const CMDLINE: &str = "console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 swiotlb=noforce \
                       root=/dev/pmem0 rootwait rootfstype=erofs rootflags=dax ro init=/sbin/init";

/// The stage that errors about a template name.
const TEMPLATE: &str = "restore the template";

/// The descriptors that came with a request. Each may be named once.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// The descriptors of one packet.
    #[must_use]
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Takes the descriptor at `index`.
    ///
    /// # Errors
    /// The request names a descriptor that was not sent, or names one
    /// twice.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, String> {
        self.0.get_mut(index).and_then(Option::take).ok_or_else(|| {
            format!("the request names descriptor {index}, which did not come with it or is named twice")
        })
    }
}

/// Builds the machine and starts it. Returns the machine and what the event
/// loop has to watch.
///
/// # Errors
/// [`StageError`]; nothing runs then.
pub fn build(
    hypervisor: Hypervisor,
    config: &VmConfig,
    mut fds: Descriptors,
    exit: &Arc<ExitSignal>,
    console: &Console,
) -> Result<(Machine, Vec<Subscriber>), StageError> {
    check(config, &hypervisor)?;

    const MEMORY: &str = "allocate guest memory";
    let root = File::from(fds.take(config.root).map_err(at(MEMORY))?);
    let root_range = memory::persistent(config.memory_mib, &root).map_err(at(MEMORY))?;
    let ram = memory::ram(config.memory_mib);
    let memory = memory::allocate(config.memory_mib, Some((&root, root_range))).map_err(at(MEMORY))?;
    let saved = config.template.map(|template| read_template(config, template, &mut fds)).transpose()?;
    let entry = match &saved {
        None => {
            let kernel = File::from(fds.take(config.kernel).map_err(at("load the kernel"))?);
            Some(kernel::load(&kernel, &memory).map_err(at("load the kernel"))?)
        }
        Some((_, file)) => {
            memory::map_saved(&memory, &ram, file).map_err(at(TEMPLATE))?;
            None
        }
    };
    hypervisor.set_memory(&memory).map_err(at(MEMORY))?;
    let vcpus = create_vcpus(&hypervisor, config.vcpus)?;
    let saved = saved.map(|(state, _)| state);
    if let Some(state) = &saved {
        // This comes before the devices, which may raise interrupts as soon as
        // they are restored.
        for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
            snapshot::vcpu::restore(vcpu, state).map_err(at(TEMPLATE))?;
        }
        snapshot::vm::restore(hypervisor.vm(), &state.vm).map_err(at(TEMPLATE))?;
    }

    let (saved_cmdline, serial, saved_devices) = match saved {
        Some(state) => (Some(state.cmdline), Some(state.serial), Some(state.devices)),
        None => (None, None, None),
    };
    let mut devices = Devices::new(&hypervisor, &memory, saved_devices).map_err(at("create devices"))?;
    console.limit(Limiter::new(config.console_limit.as_ref()));
    let serial = devices.add_legacy(exit, console, serial)?;
    devices.add_root(root_range)?;
    devices.add_disks(config, &mut fds)?;
    devices.add_nets(config, &mut fds)?;
    devices.add_vsock(config, &mut fds)?;
    devices.add_rng()?;
    devices.add_balloon(config)?;
    devices.add_fs(config)?;
    let Devices { pio, mmio, devices, transports, subscribers, parameters, .. } = devices;

    let cmdline = format!("{CMDLINE}{parameters} {}", config.cmdline).trim_end().to_owned();
    if let Some(entry) = entry {
        boot::write(&memory, &ram, &cmdline).map_err(at("write boot information"))?;
        mptable::write(&memory, config.vcpus).map_err(at("write boot information"))?;
        set_up_vcpus(&hypervisor, &memory, &vcpus, entry)?;
    } else if saved_cmdline.as_ref() != Some(&cmdline) {
        return Err(at(TEMPLATE)("it was saved with other devices, or with other words for its kernel"));
    }

    let context = Arc::new(VcpuContext {
        pio,
        mmio,
        exit: Arc::clone(exit),
        console: console.clone(),
        entered: OnceLock::new(),
    });
    let vcpus = vcpus
        .into_iter()
        .zip(0..)
        .map(|(fd, index)| Vcpu::start(index, fd, Arc::clone(&context)))
        .collect::<Result<_, _>>()
        .map_err(at("start vCPUs"))?;
    let machine = Machine { hypervisor, memory, ram, serial, cmdline, devices, transports, vcpus, context };
    Ok((machine, subscribers))
}

fn check(config: &VmConfig, hypervisor: &Hypervisor) -> Result<(), StageError> {
    let invalid = |cause: String| Err(at("check the configuration")(cause));
    let most = usize::from(MAX_VCPUS).min(hypervisor.max_vcpus());
    if config.vcpus == 0 || usize::from(config.vcpus) > most {
        return invalid(format!("{} vCPUs asked for, 1 to {most} are possible", config.vcpus));
    }
    if !config.cmdline.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return invalid("the kernel command line has characters that are not printable ASCII".into());
    }
    Ok(())
}

/// Reads the state of a saved machine. Returns it with the file of its memory.
fn read_template(
    config: &VmConfig,
    template: TemplateConfig,
    fds: &mut Descriptors,
) -> Result<(MachineState, File), StageError> {
    let state = File::from(fds.take(template.state).map_err(at(TEMPLATE))?);
    let memory = File::from(fds.take(template.memory).map_err(at(TEMPLATE))?);
    let state: MachineState = snapshot::format::read(&state).map_err(at(TEMPLATE))?;
    state.check(config.vcpus).map_err(at(TEMPLATE))?;
    Ok((state, memory))
}

fn create_vcpus(hypervisor: &Hypervisor, count: u8) -> Result<Vec<VcpuFd>, StageError> {
    (0..count).map(|index| hypervisor.create_vcpu(index).map_err(at("create vCPUs"))).collect()
}

/// Makes fresh vCPUs; the first one begins at `entry`.
fn set_up_vcpus(
    hypervisor: &Hypervisor,
    memory: &GuestMemoryMmap,
    vcpus: &[VcpuFd],
    entry: u64,
) -> Result<(), StageError> {
    const STAGE: &str = "set up vCPUs";
    let count = vcpus.len() as u8;
    let template = cpuid::Template::new(hypervisor.kvm(), count).map_err(at(STAGE))?;
    for (index, vcpu) in (0..).zip(vcpus) {
        vcpu.set_cpuid2(&template.for_vcpu(index).map_err(at(STAGE))?).map_err(at(STAGE))?;
        msr::set_boot_values(vcpu).map_err(at(STAGE))?;
        if index == 0 {
            regs::set_entry(vcpu, memory, entry).map_err(at(STAGE))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_descriptor_is_taken_once() {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let raw = file.as_raw_fd();
        let mut fds = Descriptors::new(vec![file]);
        assert_eq!(fds.take(0).unwrap().as_raw_fd(), raw);
        assert!(fds.take(0).is_err());
        assert!(fds.take(1).is_err());
    }
}
