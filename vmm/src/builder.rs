//! Builds a machine from a request to boot, stage by stage.

use std::collections::HashMap;
use std::error::Error;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use husk_vmm_api::{FdIndex, VmConfig};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout::{
    FIRST_VIRTIO_IRQ, I8042_PORT, MAX_VCPUS, MAX_VIRTIO_DEVICES, SERIAL_IRQ, SERIAL_PORT, VIRTIO_MMIO,
    VIRTIO_MMIO_SIZE,
};
use crate::arch::x86_64::{boot, cpuid, mptable, msr, regs};
use crate::devices::bus::Bus;
use crate::devices::console::Console;
use crate::devices::serial::{I8042_PORTS, ResetLine, SERIAL_PORTS, SerialPort};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, Disk, IoPool};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::pmem::Pmem;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::exit::ExitSignal;
use crate::hypervisor::Hypervisor;
use crate::machine::{Machine, Subscriber};
use crate::memory::Range;
use crate::vcpu::{Surroundings, Vcpu};
use crate::{kernel, memory};

/// What every guest's command line begins with.
///
/// `quiet`: every character on the serial port leaves the guest. `reboot=k`:
/// through the keyboard controller, see [`husk_vmm_api::SHUTDOWN_MARKER`].
/// `panic=-1`: a panic resets at once. `swiotlb=noforce`: devices reach all of
/// memory, a guest with more than 4 GiB needs no 64 MiB of bounce buffers. The
/// rest names the root and init: the files of the root are used where they lie in
/// persistent memory (DAX).
const CMDLINE: &str = "console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 swiotlb=noforce \
                       root=/dev/pmem0 rootfstype=erofs rootflags=dax ro init=/sbin/init";

/// A machine could not be built.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {cause}")]
pub struct BuildError {
    /// What was being done, "load the kernel".
    pub stage: &'static str,
    /// What went wrong.
    #[source]
    pub cause: Box<dyn Error + Send + Sync>,
}

/// Names the stage in which an error arose.
fn at<E: Into<Box<dyn Error + Send + Sync>>>(stage: &'static str) -> impl Fn(E) -> BuildError {
    move |cause| BuildError { stage, cause: cause.into() }
}

/// The descriptors that came with a request; each may be named once.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Those of one packet.
    #[must_use]
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Takes the descriptor at `index`.
    ///
    /// # Errors
    /// The message names one that was not sent, or names one twice.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, String> {
        self.0.get_mut(index).and_then(Option::take).ok_or_else(|| {
            format!("the request names descriptor {index}, which did not come with it or is named twice")
        })
    }
}

/// Builds the machine and starts it. Returns with it what the event loop has
/// to watch.
///
/// # Errors
/// [`BuildError`]; nothing runs then.
pub fn build(
    hypervisor: Hypervisor,
    config: &VmConfig,
    mut fds: Descriptors,
    exit: &Arc<ExitSignal>,
    console: &Console,
) -> Result<(Machine, Vec<Subscriber>), BuildError> {
    check(config, &hypervisor)?;

    const MEMORY: &str = "allocate guest memory";
    let root = File::from(fds.take(config.root).map_err(at(MEMORY))?);
    let root_range = memory::persistent(config.memory_mib, &root).map_err(at(MEMORY))?;
    let ram = memory::ram(config.memory_mib);
    let memory = memory::allocate(config.memory_mib, Some((&root, root_range))).map_err(at(MEMORY))?;
    let kernel = File::from(fds.take(config.kernel).map_err(at("load the kernel"))?);
    let entry = kernel::load(&kernel, &memory).map_err(at("load the kernel"))?;
    hypervisor.set_memory(&memory).map_err(at(MEMORY))?;

    let mut devices = Devices::new(&hypervisor, &memory).map_err(at("create devices"))?;
    devices.add_legacy(exit, console)?;
    devices.add_root(root_range)?;
    devices.add_disks(config, &mut fds)?;
    devices.add_nets(config, &mut fds)?;
    devices.add_vsock(config, &mut fds)?;
    devices.add_rng()?;
    let balloon = devices.add_balloon(config)?;
    let fs = devices.add_fs(config)?;
    let Devices { pio, mmio, disks, transports, subscribers, parameters, .. } = devices;

    let cmdline = format!("{CMDLINE}{parameters} {}", config.cmdline);
    boot::write(&memory, &ram, cmdline.trim_end()).map_err(at("write boot information"))?;
    mptable::write(&memory, config.vcpus).map_err(at("write boot information"))?;
    let vcpus = create_vcpus(&hypervisor, &memory, config.vcpus, entry)?;

    let surroundings = Arc::new(Surroundings {
        pio,
        mmio,
        exit: Arc::clone(exit),
        console: console.clone(),
        entered: OnceLock::new(),
    });
    let vcpus = vcpus
        .into_iter()
        .zip(0..)
        .map(|(fd, index)| Vcpu::start(index, fd, Arc::clone(&surroundings)))
        .collect::<Result<_, _>>()
        .map_err(at("start vCPUs"))?;
    let machine = Machine { hypervisor, memory, ram, disks, balloon, fs, transports, vcpus, surroundings };
    Ok((machine, subscribers))
}

fn check(config: &VmConfig, hypervisor: &Hypervisor) -> Result<(), BuildError> {
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

fn create_vcpus(
    hypervisor: &Hypervisor,
    memory: &GuestMemoryMmap,
    count: u8,
    entry: u64,
) -> Result<Vec<VcpuFd>, BuildError> {
    const STAGE: &str = "create vCPUs";
    let template = cpuid::Template::new(hypervisor.kvm(), count).map_err(at(STAGE))?;
    let mut vcpus = Vec::with_capacity(count.into());
    for index in 0..count {
        let vcpu = hypervisor.create_vcpu(index).map_err(at(STAGE))?;
        vcpu.set_cpuid2(&template.for_vcpu(index).map_err(at(STAGE))?).map_err(at(STAGE))?;
        msr::set_boot_values(&vcpu).map_err(at(STAGE))?;
        if index == 0 {
            regs::set_entry(&vcpu, memory, entry).map_err(at(STAGE))?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// The devices of a machine that is being built.
struct Devices<'a> {
    hypervisor: &'a Hypervisor,
    memory: &'a GuestMemoryMmap,
    pool: IoPool,
    pio: Bus,
    mmio: Bus,
    disks: HashMap<String, Arc<Mutex<Block>>>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    subscribers: Vec<Subscriber>,
    /// For the kernel's command line: where the devices are.
    parameters: String,
}

impl<'a> Devices<'a> {
    fn new(hypervisor: &'a Hypervisor, memory: &'a GuestMemoryMmap) -> std::io::Result<Self> {
        Ok(Self {
            hypervisor,
            memory,
            pool: IoPool::new()?,
            pio: Bus::default(),
            mmio: Bus::default(),
            disks: HashMap::new(),
            transports: Vec::new(),
            subscribers: Vec::new(),
            parameters: String::new(),
        })
    }

    /// The serial port and the reset line of the keyboard controller.
    fn add_legacy(&mut self, exit: &Arc<ExitSignal>, console: &Console) -> Result<(), BuildError> {
        const STAGE: &str = "create the serial port";
        let line = eventfd().map_err(at(STAGE))?;
        self.hypervisor.connect_interrupt(&line, SERIAL_IRQ).map_err(at(STAGE))?;
        let serial = Arc::new(Mutex::new(SerialPort::new(line, console.clone())));
        self.pio.insert(SERIAL_PORT.into(), SERIAL_PORTS, serial).map_err(at(STAGE))?;
        let reset = Arc::new(Mutex::new(ResetLine::new(Arc::clone(exit), console.clone())));
        self.pio.insert(I8042_PORT.into(), I8042_PORTS, reset).map_err(at(STAGE))
    }

    fn add_root(&mut self, range: Range) -> Result<(), BuildError> {
        self.add(Pmem::new(range).map_err(at("create the root device"))?)?;
        Ok(())
    }

    fn add_disks(&mut self, config: &VmConfig, fds: &mut Descriptors) -> Result<(), BuildError> {
        const STAGE: &str = "create disks";
        for disk in &config.disks {
            let file = fds.take(disk.file).map_err(at(STAGE))?;
            let file = Disk::new(file, disk.read_only).map_err(at(STAGE))?;
            let block = Block::with_disk(&disk.serial, file, self.pool.clone()).map_err(at(STAGE))?;
            self.add_disk(&disk.serial, block)?;
        }
        for serial in &config.slots {
            let block = Block::slot(serial, self.pool.clone()).map_err(at(STAGE))?;
            self.add_disk(serial, block)?;
        }
        Ok(())
    }

    fn add_disk(&mut self, serial: &str, block: Arc<Mutex<Block>>) -> Result<(), BuildError> {
        if self.disks.insert(serial.to_owned(), Arc::clone(&block)).is_some() {
            return Err(at("create disks")(format!("the serial number {serial:?} is used twice")));
        }
        // The pool's threads serve it, not the event loop.
        self.add_transport(block)
    }

    fn add_nets(&mut self, config: &VmConfig, fds: &mut Descriptors) -> Result<(), BuildError> {
        const STAGE: &str = "create network interfaces";
        for net in &config.nets {
            let tap = fds.take(net.tap).map_err(at(STAGE))?;
            self.add(Net::new(tap, net.mac, net.mtu).map_err(at(STAGE))?)?;
        }
        Ok(())
    }

    fn add_vsock(&mut self, config: &VmConfig, fds: &mut Descriptors) -> Result<(), BuildError> {
        const STAGE: &str = "create the vsock device";
        let Some(vsock) = &config.vsock else { return Ok(()) };
        let listener = UnixListener::from(fds.take(vsock.listener).map_err(at(STAGE))?);
        self.add(Vsock::new(vsock.cid, listener, PathBuf::from(&vsock.path)).map_err(at(STAGE))?)?;
        Ok(())
    }

    fn add_rng(&mut self) -> Result<(), BuildError> {
        self.add(Rng::new().map_err(at("create the entropy device"))?)?;
        Ok(())
    }

    fn add_balloon(&mut self, config: &VmConfig) -> Result<Option<Arc<Mutex<Balloon>>>, BuildError> {
        if !config.balloon {
            return Ok(None);
        }
        let balloon = Balloon::new().map_err(at("create the balloon"))?;
        self.add(balloon).map(Some)
    }

    /// It gets an event loop of its own together with its server.
    fn add_fs(&mut self, config: &VmConfig) -> Result<Option<Arc<Mutex<Fs>>>, BuildError> {
        let Some(tag) = &config.fs else { return Ok(None) };
        let fs = Arc::new(Mutex::new(Fs::new(tag).map_err(at("create the file system device"))?));
        self.add_transport(Arc::clone(&fs) as Arc<Mutex<dyn VirtioDevice>>)?;
        Ok(Some(fs))
    }

    /// Puts a device on the bus and into the event loop.
    fn add<D: VirtioDevice + 'static>(&mut self, device: D) -> Result<Arc<Mutex<D>>, BuildError> {
        let device = Arc::new(Mutex::new(device));
        self.subscribers.push(Arc::clone(&device) as Subscriber);
        self.add_transport(Arc::clone(&device) as Arc<Mutex<dyn VirtioDevice>>)?;
        Ok(device)
    }

    fn add_transport(&mut self, device: Arc<Mutex<dyn VirtioDevice>>) -> Result<(), BuildError> {
        const STAGE: &str = "connect a virtio device";
        let index = self.transports.len();
        if index >= MAX_VIRTIO_DEVICES {
            return Err(at(STAGE)(format!("a machine has at most {MAX_VIRTIO_DEVICES} devices")));
        }
        let address = VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_SIZE;
        let irq = FIRST_VIRTIO_IRQ + index as u32;
        let line = eventfd().map_err(at(STAGE))?;
        self.hypervisor.connect_interrupt(&line, irq).map_err(at(STAGE))?;
        let transport = MmioTransport::new(device, self.memory.clone(), line).map_err(at(STAGE))?;
        for (event, queue) in transport.queue_events().iter().zip(0..) {
            self.hypervisor.connect_notification(event, address + QUEUE_NOTIFY, queue).map_err(at(STAGE))?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.mmio.insert(address, VIRTIO_MMIO_SIZE, Arc::clone(&transport) as _).map_err(at(STAGE))?;
        self.transports.push(transport);
        self.parameters += &format!(" virtio_mmio.device={}K@{address:#x}:{irq}", VIRTIO_MMIO_SIZE >> 10);
        Ok(())
    }
}

fn eventfd() -> std::io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

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
