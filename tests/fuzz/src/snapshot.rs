//! Snapshots: the state of a machine's devices, as a clone begins with it. Who can write a snapshot owns the machine that
//! is made of it, but not its VMM.

use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};
use husk_vmm::devices::virtio::balloon::Balloon;
use husk_vmm::devices::virtio::block::{Block, IoPool};
use husk_vmm::devices::virtio::device::VirtioDevice;
use husk_vmm::devices::virtio::fs::Fs;
use husk_vmm::devices::virtio::kinds::{DeviceState, Own};
use husk_vmm::devices::virtio::mmio::{MmioTransport, TransportState};
use husk_vmm::devices::virtio::pmem::Pmem;
use husk_vmm::devices::virtio::rng::Rng;
use husk_vmm::devices::virtio::vsock::Vsock;
use husk_vmm::machine::Subscriber;
use husk_vmm::snapshot::format;
use husk_vmm::snapshot::machine::MachineState;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::block::{POOL, disk};
use crate::devices::vsock::LISTENER;

const MEMORY: usize = 512 << 10;

/// Reads a snapshot: as it is in a file, or the payload of one whose header is right.
pub fn run(data: &[u8]) {
    let Some((how, payload)) = data.split_first() else { return };
    match how % 3 {
        0 => {
            let _ = format::read::<MachineState>(payload);
        }
        1 => {
            let _ = format::read::<MachineState>(with_header(payload).as_slice()).map(|state| state.check(1));
        }
        _ => {
            let Ok(devices) = format::read::<Vec<DeviceState>>(with_header(payload).as_slice()) else {
                return;
            };
            devices.into_iter().take(4).for_each(restore);
        }
    }
}

/// The header of a snapshot's file, whose checksum no fuzzer finds.
fn with_header(payload: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    // The header of any state, with the length and the checksum of this one.
    let _ = format::write(&mut file, &());
    file.truncate(24);
    file[12..16].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    file[16..24].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    file.extend_from_slice(payload);
    file
}

/// Makes a device of its state, and lets it work.
fn restore(state: DeviceState) {
    let DeviceState { own, transport } = state;
    match own {
        Own::Pmem(state) => {
            Pmem::restore(&state).map(Mutex::new).map(Arc::new).map(|device| work(device, transport)).ok()
        }
        Own::Rng(state) => {
            Rng::restore(&state).map(Mutex::new).map(Arc::new).map(|device| work(device, transport)).ok()
        }
        Own::Balloon(state) => {
            Balloon::restore(&state).map(Mutex::new).map(Arc::new).map(|device| work(device, transport)).ok()
        }
        Own::Fs(state) => {
            Fs::restore(&state, None).map(Mutex::new).map(Arc::new).map(|device| work(device, transport)).ok()
        }
        Own::Vsock(state) => {
            let listener = LISTENER.1.try_clone().ok();
            listener
                .and_then(|listener| Vsock::restore(&state, listener, None).ok())
                .map(|device| work(Arc::new(Mutex::new(device)), transport))
        }
        Own::Block(state) => {
            let device = Block::restore(&state, Some(disk(false)), POOL.clone(), [None, None]).ok();
            device.map(|device| work(device, transport))
        }
        // It needs a tap.
        Own::Net(_) => None,
    };
}

#[allow(clippy::unwrap_used)]
fn work<D: VirtioDevice + 'static>(device: Arc<Mutex<D>>, state: TransportState) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let mut events = EventManager::<Subscriber>::new().unwrap();
    events.add_subscriber(Arc::clone(&device) as Subscriber);
    let mut transport = MmioTransport::new(device, memory, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
    if transport.restore(state).is_err() {
        return;
    }
    let _ = transport.report();
    for _ in 0..20 {
        if events.run_with_timeout(0).unwrap() == 0 {
            break;
        }
    }
    let _ = transport.save();
}

/// States of devices that no driver has met yet, and of some that one has.
#[must_use]
#[allow(clippy::unwrap_used)]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for active in [false, true] {
        let rng = Arc::new(Mutex::new(Rng::new().unwrap()));
        let vsock = Arc::new(Mutex::new(Vsock::new(3, LISTENER.1.try_clone().unwrap(), None).unwrap()));
        let block = Block::with_disk("disk", disk(false), IoPool::new().unwrap()).unwrap();
        let fs = Arc::new(Mutex::new(Fs::new("volumes").unwrap()));
        let balloon = Arc::new(Mutex::new(Balloon::new().unwrap()));
        let states = [
            state(rng, active, |rng| Own::Rng(rng.save())),
            state(vsock, active, |vsock| Own::Vsock(vsock.save())),
            state(block, active, |block| Own::Block(block.save())),
            state(fs, active, |fs| Own::Fs(fs.save())),
            state(balloon, active, |balloon| Own::Balloon(balloon.save())),
        ];
        for state in states {
            let mut file = Vec::new();
            format::write(&mut file, &vec![state]).unwrap();
            seeds.push([&[2][..], &file[24..]].concat());
        }
    }
    seeds
}

/// The saved state of a device, whose driver has set it up if it is `active`.
#[allow(clippy::unwrap_used)]
fn state<D: VirtioDevice + 'static>(
    device: Arc<Mutex<D>>,
    active: bool,
    own: impl FnOnce(&mut D) -> Own,
) -> DeviceState {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut transport = MmioTransport::new(device.clone(), memory, interrupt).unwrap();
    if active {
        crate::guest::set_up(&mut transport);
    }
    DeviceState { transport: transport.save(), own: own(&mut husk_vmm::lock(&device)) }
}
