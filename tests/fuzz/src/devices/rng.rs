//! The entropy device.

use std::sync::{Arc, Mutex};

use husk_vmm::devices::virtio::rng::Rng;

use crate::guest::{Program, World, play};
use crate::input::Input;

struct Host(Arc<Mutex<Rng>>);

impl World for Host {
    type Device = Rng;

    fn device(&self) -> Arc<Mutex<Rng>> {
        Arc::clone(&self.0)
    }

    fn host(&mut self, _: &mut Input) {}
}

/// Plays one guest.
#[allow(clippy::unwrap_used)]
pub fn run(data: &[u8]) {
    play(Host(Arc::new(Mutex::new(Rng::new().unwrap()))), &mut Input::new(data));
}

/// Guests to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    vec![
        Program::default().negotiate(0).request(0, &[], 64).request_in(0, 2, &[], 4096).kick(0).look().done(),
        Program::default().negotiate(1 << 29).request(0, &[], 1).kick(0).reset().negotiate(0).kick(0).done(),
        Program::default().negotiate(0).strange(0, 0x1_0000, 64, 3).kick(0).done(),
    ]
}
