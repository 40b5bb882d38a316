//! The block device: a fixed disk that is read-only or not, or a slot whose disks come and go.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, LazyLock, Mutex};

use husk_vmm::devices::virtio::block::{Block, Disk, IoPool};

use crate::guest::{Program, World, play};
use crate::input::{Input, Output};

/// Sectors of a disk.
const SECTORS: u64 = 64;

/// Its thread waits for notifications that never come: requests are worked on by the thread that plays the guest, so
/// that a program always does the same.
#[allow(clippy::unwrap_used)]
pub(crate) static POOL: LazyLock<IoPool> = LazyLock::new(|| IoPool::new().unwrap());

struct Host(Arc<Mutex<Block>>);

#[allow(clippy::unwrap_used)]
pub(crate) fn disk(read_only: bool) -> Disk {
    // SAFETY: the name ends with a zero.
    let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(SECTORS * 512 + 100).unwrap();
    Disk::new(file.into(), read_only).unwrap()
}

impl World for Host {
    type Device = Block;

    fn device(&self) -> Arc<Mutex<Block>> {
        Arc::clone(&self.0)
    }

    fn host(&mut self, input: &mut Input) {
        let mut device = husk_vmm::lock(&self.0);
        let _ = match input.byte() % 4 {
            0 => device.attach(disk(false)),
            1 => device.attach(disk(true)),
            2 => device.detach(),
            _ => {
                let _ = device.save();
                Ok(())
            }
        };
    }

    fn settle(&mut self) {
        husk_vmm::devices::virtio::block::pool::serve_all(&self.0, &POOL);
    }

    fn notify(&mut self) -> bool {
        true
    }
}

/// Plays one guest.
#[allow(clippy::unwrap_used)]
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let device = match input.byte() % 3 {
        0 => Block::with_disk("disk", disk(false), POOL.clone()),
        1 => Block::with_disk("disk", disk(true), POOL.clone()),
        _ => Block::slot("disk", POOL.clone()),
    };
    play(Host(device.unwrap()), &mut input);
}

/// Guests to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let header = |kind: u32, sector: u64| Output::default().u32(kind).u32(0).u64(sector).0;
    let write = [header(1, 3), vec![7; 1024]].concat();
    let range = |flags: u32| Output::default().u64(8).u32(16).u32(flags).0;
    let (discard, zeroes) = ([header(11, 0), range(0)].concat(), [header(13, 0), range(1)].concat());
    vec![
        Program::new(&[0])
            .negotiate(0)
            .request(0, &write, 1)
            .request_in(0, 1, &header(0, 3), 1025)
            .request(0, &header(4, 0), 1)
            .request(0, &header(8, 0), 21)
            .kick(0)
            .look()
            .done(),
        Program::new(&[0])
            .negotiate(0)
            .request_in(0, 6, &discard, 1)
            .request_in(0, 4, &zeroes, 1)
            .kick(0)
            .done(),
        Program::new(&[1])
            .negotiate(1 << 29)
            .request(0, &write, 1)
            .request(0, &header(0, 63), 513)
            .kick(0)
            .done(),
        Program::new(&[2])
            .negotiate(0)
            .request(0, &header(0, 0), 513)
            .kick(0)
            .host(&[0])
            .request(0, &header(0, 0), 513)
            .kick(0)
            .host(&[2])
            .reset()
            .done(),
        Program::new(&[0]).negotiate(0).strange(0, 0x1_0000, 16, 1).kick(0).done(),
    ]
}
