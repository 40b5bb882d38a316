//! The network interface. In the place of the tap is a socket, so that no packet of a fuzzer reaches the kernel's
//! network, and packets to the guest come when the input says so.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use husk_vmm::devices::virtio::net::Net;

use super::{packets, receive, send};
use crate::guest::{Program, World, play};
use crate::input::{Input, Output};

const MTU: u16 = 1500;

struct Host {
    device: Arc<Mutex<Net>>,
    tap: OwnedFd,
}

impl World for Host {
    type Device = Net;

    fn device(&self) -> Arc<Mutex<Net>> {
        Arc::clone(&self.device)
    }

    fn host(&mut self, input: &mut Input) {
        let (count, length) = (input.byte() % 4, usize::from(input.u16()));
        let bytes = input.bytes(length.min(64));
        let mut packet = vec![0; length];
        packet.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        (0..=count).for_each(|_| send(&self.tap, &packet));
    }

    fn settle(&mut self) {
        let mut packet = [0; 1 << 17];
        while let Some(length) = receive(&self.tap, &mut packet) {
            assert!(length <= 12 + 18 + (64 << 10), "a packet of {length} bytes reached the tap");
        }
    }
}

/// Plays one guest.
#[allow(clippy::unwrap_used)]
pub fn run(data: &[u8]) {
    let (ours, tap) = packets();
    let device = Net::on_socket(ours, [2, 0, 0, 0, 0, 1], MTU).unwrap();
    play(Host { device: Arc::new(Mutex::new(device)), tap }, &mut Input::new(data));
}

/// Guests to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let packet = [vec![0; 12], vec![0xff; 60]].concat();
    let incoming = |count: u8, length: u16| Output::default().byte(count).u16(length).bytes(&[0; 64]).0;
    let segments = [vec![1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], vec![0x45; 400]].concat();
    vec![
        Program::default()
            .negotiate(0)
            .request(1, &packet, 0)
            .request_in(1, 2, &packet, 0)
            .kick(1)
            .look()
            .done(),
        Program::default()
            .negotiate(0)
            .request(0, &[], 4096)
            .request(0, &[], 4096)
            .request_in(0, 3, &[], 512)
            .kick(0)
            .host(&incoming(2, 900))
            .host(&incoming(0, 5000))
            .done(),
        Program::default()
            .negotiate(1 << 15 | 1 << 29)
            .request_in(0, 4, &[], 1600)
            .host(&incoming(0, 1514))
            .request(1, &segments, 0)
            .kick(1)
            .reset()
            .done(),
        Program::default().negotiate(0).strange(1, 0x1_0000, 0xffff_ffff, 1).kick(1).done(),
    ]
}
