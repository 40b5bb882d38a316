//! The file system device. The file server is at the other end of a socket; the input says what it answers, and an
//! answer may be as wrong as a guest's request.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use husk_vmm::devices::virtio::fs::Fs;

use super::{packets, receive, send};
use crate::guest::{Program, World, play};
use crate::input::{Input, Output};

struct Host {
    device: Arc<Mutex<Fs>>,
    server: Option<OwnedFd>,
    /// The numbers of the requests that came.
    asked: Vec<u64>,
}

impl World for Host {
    type Device = Fs;

    fn device(&self) -> Arc<Mutex<Fs>> {
        Arc::clone(&self.device)
    }

    fn host(&mut self, input: &mut Input) {
        let (kind, which) = (input.byte() % 5, usize::from(input.byte()));
        let Some(server) = &self.server else { return };
        let unique = self.asked.get(which % self.asked.len().max(1)).copied().unwrap_or_default();
        match kind {
            // An answer that is right, however long.
            0 => {
                let (error, length) = (u32::from(input.byte()), usize::from(input.u16()));
                let head = Output::default().u32(16 + length as u32).u32(error.wrapping_neg()).u64(unique).0;
                send(server, &[head, vec![0x5a; length]].concat());
            }
            // One with another length, or to no request.
            1 => {
                let head =
                    Output::default().u32(input.u32()).u32(input.u32()).u64(unique ^ u64::from(input.byte()));
                send(server, &head.bytes(input.bytes(which)).0);
            }
            2 => send(server, input.bytes(which)),
            3 => self.server = None,
            _ => {
                let _ = husk_vmm::lock(&self.device).save();
            }
        }
    }

    fn settle(&mut self) {
        let mut message = [0; 1 << 18];
        let Some(server) = &self.server else { return };
        while let Some(length) = receive(server, &mut message) {
            assert!(length >= 40, "a request of {length} bytes reached the server");
            let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| message[at + byte]));
            assert_eq!(word(0) as usize, length, "a request says another length than it has");
            let unique = u64::from(word(8)) | u64::from(word(12)) << 32;
            assert!(self.asked.last().is_none_or(|last| *last < unique), "a number is used again");
            self.asked.push(unique);
        }
    }
}

/// Plays one guest.
#[allow(clippy::unwrap_used)]
pub fn run(data: &[u8]) {
    let (ours, server) = packets();
    let mut device = Fs::new("volumes").unwrap();
    device.attach(ours).unwrap();
    let host = Host { device: Arc::new(Mutex::new(device)), server: Some(server), asked: Vec::new() };
    play(host, &mut Input::new(data));
}

/// A request of FUSE.
fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + body.len()).unwrap_or_default();
    Output::default().u32(length).u32(opcode).u64(9).u64(1).u64(0).u64(0).bytes(body).0
}

/// Guests to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let init = request(26, &Output::default().u32(7).u32(38).u32(0x2_0000).u32(0).0);
    let answer = |which: u8, length: u16| Output::default().byte(0).byte(which).byte(0).u16(length).0;
    vec![
        Program::default()
            .negotiate(0)
            .request(1, &init, 80)
            .kick(1)
            .host(&answer(0, 64))
            .request_in(1, 5, &request(15, &[0; 40]), 4112)
            .request(0, &request(2, &[1, 0, 0, 0, 0, 0, 0, 0]), 0)
            .kick(0)
            .host(&answer(1, 4096))
            .look()
            .done(),
        Program::default()
            .negotiate(0)
            .request(1, &init, 80)
            .kick(1)
            .host(&[3, 0])
            .request(1, &init, 80)
            .kick(1)
            .done(),
        Program::default().negotiate(0).request(1, &init, 80).kick(1).reset().host(&answer(0, 64)).done(),
        Program::default().negotiate(1 << 29).strange(1, 0x1_0000, 40, 0).kick(1).done(),
    ]
}
