//! The balloon, whose size the host changes.

use std::sync::{Arc, Mutex};

use husk_vmm::devices::virtio::balloon::Balloon;

use crate::guest::{Program, World, play};
use crate::input::Input;

struct Host(Arc<Mutex<Balloon>>);

impl World for Host {
    type Device = Balloon;

    const KEEPS_MEMORY: bool = false;

    fn device(&self) -> Arc<Mutex<Balloon>> {
        Arc::clone(&self.0)
    }

    fn host(&mut self, input: &mut Input) {
        let mut device = husk_vmm::lock(&self.0);
        device.set_size_mib(input.u32());
        let _ = device.actual_mib();
    }
}

/// Plays one guest.
#[allow(clippy::unwrap_used)]
pub fn run(data: &[u8]) {
    play(Host(Arc::new(Mutex::new(Balloon::new().unwrap()))), &mut Input::new(data));
}

/// Guests to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let pages: Vec<u8> =
        [100u32, 101, 102, 90, 0xffff_ffff].iter().flat_map(|page| page.to_le_bytes()).collect();
    vec![
        Program::default().negotiate(0).host(&[1, 0, 0, 0]).request(0, &pages, 0).kick(0).look().done(),
        Program::default()
            .negotiate(0)
            .request(1, &pages, 0)
            .kick(1)
            .request_in(2, 3, &[], 0x4000)
            .kick(2)
            .done(),
        Program::default().negotiate(1 << 29).strange(2, 0x1_0000, 0x8000, 2).kick(2).reset().done(),
    ]
}
