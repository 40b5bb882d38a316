//! The devices of a machine: new ones for a machine that boots, or those of a
//! template.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use husk_vmm_api::{RateLimit, VmConfig};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{Descriptors, TEMPLATE};
use crate::arch::x86_64::layout::{
    FIRST_VIRTIO_IRQ, I8042_PORT, MAX_VIRTIO_DEVICES, SERIAL_IRQ, SERIAL_PORT, VIRTIO_MMIO, VIRTIO_MMIO_SIZE,
};
use crate::console::Console;
use crate::devices::bus::Bus;
use crate::devices::serial::{I8042_PORTS, ResetLine, SERIAL_PORTS, SerialPort, SerialPortState};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, Disk, IoPool};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::kinds::{Device, DeviceState, Own};
use crate::devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY, TransportState};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::pmem::Pmem;
use crate::devices::virtio::rate::Limiter;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{HostPort, Vsock};
use crate::exit::ExitSignal;
use crate::hypervisor::Hypervisor;
use crate::lock;
use crate::machine::Subscriber;
use crate::memory::Range;
use crate::stage::{StageError, at};

/// The devices of a machine that is being built.
pub(super) struct Devices<'a> {
    hypervisor: &'a Hypervisor,
    memory: &'a GuestMemoryMmap,
    /// The devices of the template that are yet to be added.
    saved: Option<std::vec::IntoIter<DeviceState>>,
    pool: IoPool,
    pub(super) pio: Bus,
    pub(super) mmio: Bus,
    pub(super) devices: Vec<Device>,
    pub(super) transports: Vec<Arc<Mutex<MmioTransport>>>,
    pub(super) subscribers: Vec<Subscriber>,
    /// The part of the kernel's command line that says where the devices are.
    pub(super) parameters: String,
}

impl<'a> Devices<'a> {
    pub(super) fn new(
        hypervisor: &'a Hypervisor,
        memory: &'a GuestMemoryMmap,
        saved: Option<Vec<DeviceState>>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            hypervisor,
            memory,
            saved: saved.map(Vec::into_iter),
            pool: IoPool::new()?,
            pio: Bus::default(),
            mmio: Bus::default(),
            devices: Vec::new(),
            transports: Vec::new(),
            subscribers: Vec::new(),
            parameters: String::new(),
        })
    }

    /// Adds the serial port and the reset line of the keyboard controller.
    pub(super) fn add_legacy(
        &mut self,
        exit: &Arc<ExitSignal>,
        console: &Console,
        saved: Option<SerialPortState>,
    ) -> Result<Arc<Mutex<SerialPort>>, StageError> {
        const STAGE: &str = "create the serial port";
        let line = eventfd().map_err(at(STAGE))?;
        self.hypervisor.connect_interrupt(&line, SERIAL_IRQ).map_err(at(STAGE))?;
        let serial = match saved {
            None => SerialPort::new(line, console.clone()),
            Some(state) => SerialPort::restore(state, line, console.clone()).map_err(at(TEMPLATE))?,
        };
        let serial = Arc::new(Mutex::new(serial));
        self.pio.insert(SERIAL_PORT.into(), SERIAL_PORTS, Arc::clone(&serial) as _).map_err(at(STAGE))?;
        let reset = Arc::new(Mutex::new(ResetLine::new(Arc::clone(exit), console.clone())));
        self.pio.insert(I8042_PORT.into(), I8042_PORTS, reset).map_err(at(STAGE))?;
        Ok(serial)
    }

    pub(super) fn add_root(&mut self, range: Range) -> Result<(), StageError> {
        const STAGE: &str = "create the root device";
        let (device, transport) = match self.next_saved()? {
            None => (Pmem::new(range).map_err(at(STAGE))?, None),
            Some(DeviceState { own: Own::Pmem(state), transport })
                if (state.start, state.size) == (range.start.0, range.size) =>
            {
                (Pmem::restore(&state).map_err(at(TEMPLATE))?, Some(transport))
            }
            Some(_) => return Err(another("the root file system")),
        };
        self.add(device, Device::Pmem, transport)
    }

    pub(super) fn add_disks(&mut self, config: &VmConfig, fds: &mut Descriptors) -> Result<(), StageError> {
        const STAGE: &str = "create disks";
        for disk in &config.disks {
            let file = fds.take(disk.file).map_err(at(STAGE))?;
            let file = Disk::new(file, disk.read_only).map_err(at(STAGE))?;
            self.add_disk(&disk.serial, Some(file), [disk.limit.as_ref(), disk.flush_limit.as_ref()])?;
        }
        for serial in &config.slots {
            self.add_disk(serial, None, [config.slot_limit.as_ref(), None])?;
        }
        Ok(())
    }

    /// Adds a disk, which the threads of the pool serve instead of the event
    /// loop.
    fn add_disk(
        &mut self,
        serial: &str,
        disk: Option<Disk>,
        limits: [Option<&RateLimit>; 2],
    ) -> Result<(), StageError> {
        const STAGE: &str = "create disks";
        let pool = self.pool.clone();
        let read_only = disk.as_ref().is_some_and(Disk::read_only);
        let limiters = limits.map(Limiter::new);
        let (block, transport) = match (self.next_saved()?, disk) {
            (None, disk) => {
                let block = match disk {
                    Some(disk) => Block::with_disk(serial, disk, pool),
                    None => Block::slot(serial, pool),
                }
                .map_err(at(STAGE))?;
                let [requests, flushes] = limiters;
                lock(&block).limit(requests, flushes).map_err(at(STAGE))?;
                (block, None)
            }
            (Some(DeviceState { own: Own::Block(state), transport }), disk) => {
                (Block::restore(&state, disk, pool, limiters).map_err(at(TEMPLATE))?, Some(transport))
            }
            (Some(_), _) => return Err(another("a disk")),
        };
        if lock(&block).serial() != serial || lock(&block).read_only() != read_only {
            return Err(another("a disk"));
        }
        let used = |device: &Device| matches!(device, Device::Block(other) if lock(other).serial() == serial);
        if self.devices.iter().any(used) {
            return Err(at(STAGE)(format!("the serial number {serial:?} is used twice")));
        }
        self.devices.push(Device::Block(Arc::clone(&block)));
        self.add_transport(block, transport)
    }

    pub(super) fn add_nets(&mut self, config: &VmConfig, fds: &mut Descriptors) -> Result<(), StageError> {
        const STAGE: &str = "create network interfaces";
        for net in &config.nets {
            let tap = fds.take(net.tap).map_err(at(STAGE))?;
            let limiters = [net.receive_limit.as_ref(), net.send_limit.as_ref()];
            let [receive, send] = limiters.map(Limiter::new);
            let (device, transport) = match self.next_saved()? {
                None => {
                    let mut device = Net::new(tap, net.mac, net.mtu).map_err(at(STAGE))?;
                    device.limit(receive, send).map_err(at(STAGE))?;
                    (device, None)
                }
                Some(DeviceState { own: Own::Net(state), transport })
                    if (state.mac, state.mtu) == (net.mac, net.mtu) =>
                {
                    (Net::restore(&state, tap, receive, send).map_err(at(TEMPLATE))?, Some(transport))
                }
                Some(_) => return Err(another("a network interface")),
            };
            self.add(device, Device::Net, transport)?;
        }
        Ok(())
    }

    pub(super) fn add_vsock(&mut self, config: &VmConfig, fds: &mut Descriptors) -> Result<(), StageError> {
        const STAGE: &str = "create the vsock device";
        let Some(vsock) = &config.vsock else { return Ok(()) };
        let listener = UnixListener::from(fds.take(vsock.listener).map_err(at(STAGE))?);
        let host_port = vsock.host_port.as_ref().map(|host| {
            let socket = UnixStream::from(fds.take(host.socket).map_err(at(STAGE))?);
            Ok(HostPort { port: host.port, socket })
        });
        let host_port = host_port.transpose()?;
        let limiter = Limiter::new(vsock.limit.as_ref());
        let (device, transport) = match self.next_saved()? {
            None => {
                let mut device = Vsock::new(vsock.cid, listener, host_port).map_err(at(STAGE))?;
                device.limit(limiter).map_err(at(STAGE))?;
                (device, None)
            }
            Some(DeviceState { own: Own::Vsock(state), transport }) if state.cid == vsock.cid => {
                (Vsock::restore(&state, listener, limiter).map_err(at(TEMPLATE))?, Some(transport))
            }
            Some(_) => return Err(another("a vsock device")),
        };
        self.add(device, Device::Vsock, transport)
    }

    pub(super) fn add_rng(&mut self) -> Result<(), StageError> {
        let (device, transport) = match self.next_saved()? {
            None => (Rng::new().map_err(at("create the entropy device"))?, None),
            Some(DeviceState { own: Own::Rng(state), transport }) => {
                (Rng::restore(&state).map_err(at(TEMPLATE))?, Some(transport))
            }
            Some(_) => return Err(another("an entropy device")),
        };
        self.add(device, Device::Rng, transport)
    }

    pub(super) fn add_balloon(&mut self, config: &VmConfig) -> Result<(), StageError> {
        if !config.balloon {
            return Ok(());
        }
        let (device, transport) = match self.next_saved()? {
            None => (Balloon::new().map_err(at("create the balloon"))?, None),
            Some(DeviceState { own: Own::Balloon(state), transport }) => {
                (Balloon::restore(&state).map_err(at(TEMPLATE))?, Some(transport))
            }
            Some(_) => return Err(another("a balloon")),
        };
        self.add(device, Device::Balloon, transport)
    }

    /// Adds the file system device. It gets an event loop of its own once its
    /// server is there.
    pub(super) fn add_fs(&mut self, config: &VmConfig) -> Result<(), StageError> {
        const STAGE: &str = "create the file system device";
        let Some(tag) = &config.fs else { return Ok(()) };
        let limiter = Limiter::new(config.fs_limit.as_ref());
        let (device, transport) = match self.next_saved()? {
            None => {
                let mut device = Fs::new(tag).map_err(at(STAGE))?;
                device.limit(limiter).map_err(at(STAGE))?;
                (device, None)
            }
            Some(DeviceState { own: Own::Fs(state), transport }) if state.tag == *tag => {
                (Fs::restore(&state, limiter).map_err(at(TEMPLATE))?, Some(transport))
            }
            Some(_) => return Err(another("a file system device")),
        };
        let fs = Arc::new(Mutex::new(device));
        self.devices.push(Device::Fs(Arc::clone(&fs)));
        self.add_transport(fs, transport)
    }

    /// The next device of the template; `None` for a machine that boots.
    fn next_saved(&mut self) -> Result<Option<DeviceState>, StageError> {
        let Some(saved) = &mut self.saved else { return Ok(None) };
        saved.next().map(Some).ok_or_else(|| another("one device more"))
    }

    /// Puts a device on the bus and into the event loop.
    fn add<D: VirtioDevice + MutEventSubscriber + Send + 'static>(
        &mut self,
        device: D,
        kind: fn(Arc<Mutex<D>>) -> Device,
        transport: Option<TransportState>,
    ) -> Result<(), StageError> {
        let device = Arc::new(Mutex::new(device));
        self.subscribers.push(Arc::clone(&device) as Subscriber);
        self.devices.push(kind(Arc::clone(&device)));
        self.add_transport(device, transport)
    }

    fn add_transport(
        &mut self,
        device: Arc<Mutex<dyn VirtioDevice>>,
        saved: Option<TransportState>,
    ) -> Result<(), StageError> {
        const STAGE: &str = "connect a virtio device";
        let index = self.transports.len();
        if index >= MAX_VIRTIO_DEVICES {
            return Err(at(STAGE)(format!("a machine has at most {MAX_VIRTIO_DEVICES} devices")));
        }
        let address = VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_SIZE;
        let irq = FIRST_VIRTIO_IRQ + index as u32;
        let line = eventfd().map_err(at(STAGE))?;
        self.hypervisor.connect_interrupt(&line, irq).map_err(at(STAGE))?;
        let mut transport = MmioTransport::new(device, self.memory.clone(), line).map_err(at(STAGE))?;
        for (event, queue) in transport.queue_events().iter().zip(0..) {
            self.hypervisor.connect_notification(event, address + QUEUE_NOTIFY, queue).map_err(at(STAGE))?;
        }
        if let Some(saved) = saved {
            transport.restore(saved).map_err(at(TEMPLATE))?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.mmio.insert(address, VIRTIO_MMIO_SIZE, Arc::clone(&transport) as _).map_err(at(STAGE))?;
        self.transports.push(transport);
        self.parameters += &format!(" virtio_mmio.device={}K@{address:#x}:{irq}", VIRTIO_MMIO_SIZE >> 10);
        Ok(())
    }
}

/// The error that the template has another device in this place than the
/// request.
fn another(what: &str) -> StageError {
    at(TEMPLATE)(format!("it was saved with another device in the place of {what}"))
}

fn eventfd() -> std::io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}
