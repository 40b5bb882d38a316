//! The persistent memory device.

use std::sync::{Arc, Mutex};

use husk_vmm::devices::virtio::pmem::Pmem;
use husk_vmm::memory::Range;
use vm_memory::GuestAddress;

use crate::guest::{Program, World, play};
use crate::input::Input;

struct Host(Arc<Mutex<Pmem>>);

impl World for Host {
    type Device = Pmem;

    fn device(&self) -> Arc<Mutex<Pmem>> {
        Arc::clone(&self.0)
    }

    fn host(&mut self, _: &mut Input) {}
}

/// Plays one guest.
#[allow(clippy::unwrap_used)]
pub fn run(data: &[u8]) {
    let range = Range { start: GuestAddress(1 << 32), size: 2 << 20 };
    play(Host(Arc::new(Mutex::new(Pmem::new(range).unwrap()))), &mut Input::new(data));
}

/// Guests to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    vec![
        Program::default().negotiate(0).request(0, &[0; 4], 4).kick(0).look().done(),
        Program::default().negotiate(1 << 29).request_in(0, 1, &[1, 0, 0, 0], 4).kick(0).reset().done(),
        Program::default().negotiate(0).strange(0, 0x1_0000, 4, 2).kick(0).done(),
    ]
}
