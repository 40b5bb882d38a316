//! The vsock device and its muxer: connections from host clients, and the one that the guest may make.

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, LazyLock, Mutex};

use husk_vmm::devices::virtio::vsock::{HostPort, Vsock};

use crate::guest::{Program, World, play};
use crate::input::{Input, Output};

const CID: u32 = 3;
/// The port of the host that the guest can connect to.
const PORT: u32 = 1024;
/// Most host clients of a program.
const MAX_CLIENTS: usize = 32;

/// The address of the listener, which no path leads to.
#[allow(clippy::unwrap_used)]
pub(crate) static LISTENER: LazyLock<(SocketAddr, UnixListener)> = LazyLock::new(|| {
    let address = SocketAddr::from_abstract_name(format!("husk-fuzz-{}", std::process::id())).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    (address, listener)
});

struct Host {
    device: Arc<Mutex<Vsock>>,
    clients: Vec<UnixStream>,
}

impl Host {
    fn connect(&mut self, line: &[u8]) {
        if self.clients.len() >= MAX_CLIENTS {
            return;
        }
        let Ok(mut client) = UnixStream::connect_addr(&LISTENER.0) else { return };
        let _ = client.set_nonblocking(true);
        let _ = client.write(line);
        self.clients.push(client);
    }
}

impl World for Host {
    type Device = Vsock;

    fn device(&self) -> Arc<Mutex<Vsock>> {
        Arc::clone(&self.device)
    }

    fn host(&mut self, input: &mut Input) {
        let (kind, which) = (input.byte() % 8, usize::from(input.byte()));
        match kind {
            0 => return self.connect(format!("CONNECT {which}\n").as_bytes()),
            1 => return self.connect(input.bytes(which % 40)),
            _ => {}
        }
        if self.clients.is_empty() {
            return;
        }
        let which = which % self.clients.len();
        let client = &mut self.clients[which];
        match kind {
            2 => drop(self.clients.swap_remove(which)),
            3 => drop(client.shutdown(std::net::Shutdown::Write)),
            4 => drop(client.shutdown(std::net::Shutdown::Read)),
            5 => {
                let length = usize::from(input.u16());
                let _ = client.write(&vec![0x5a; length]);
            }
            6 => {
                let _ = client.read(&mut vec![0; usize::from(input.u16())]);
            }
            _ => {
                let _ = husk_vmm::lock(&self.device).save();
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        assert!(husk_vmm::lock(&self.device).connections() <= 1024, "more connections than there may be");
        self.clients.clear();
        // Clients that nobody has accepted are not the next guest's.
        let _ = LISTENER.1.set_nonblocking(true);
        while LISTENER.1.accept().is_ok() {}
    }
}

/// Plays one guest.
#[allow(clippy::unwrap_used)]
pub fn run(data: &[u8]) {
    let (socket, client) = UnixStream::pair().unwrap();
    client.set_nonblocking(true).unwrap();
    let listener = LISTENER.1.try_clone().unwrap();
    let device = Vsock::new(CID, listener, Some(HostPort { port: PORT, socket })).unwrap();
    play(Host { device: Arc::new(Mutex::new(device)), clients: vec![client] }, &mut Input::new(data));
}

/// A packet from the guest.
fn packet(ports: (u32, u32), op: u16, flags: u32, credit: (u32, u32), payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or_default();
    let head = Output::default().u64(CID.into()).u64(2).u32(ports.0).u32(ports.1).u32(length);
    head.u16(1).u16(op).u32(flags).u32(credit.0).u32(credit.1).bytes(payload).0
}

/// Guests to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    const ROOM: (u32, u32) = (1 << 18, 0);
    let (out, back) = ((5000, PORT), (10, 1 << 30));
    let receive =
        |program: Program| (0..6).fold(program, |program, _| program.request_in(0, 1, &[], 4400)).kick(0);
    vec![
        receive(Program::default().negotiate(0))
            .request(1, &packet(out, 1, 0, ROOM, &[]), 0)
            .kick(1)
            .request_in(1, 1, &packet(out, 5, 0, ROOM, b"words to the host"), 0)
            .kick(1)
            .host(&[5, 0, 0, 16])
            .host(&[6, 0, 255, 0])
            .request(1, &packet(out, 4, 3, ROOM, &[]), 0)
            .kick(1)
            .look()
            .done(),
        receive(Program::default().negotiate(0))
            .host(&[0, 10])
            .request(1, &packet(back, 2, 0, ROOM, &[]), 0)
            .kick(1)
            .host(&[5, 1, 0, 64])
            .request(1, &packet(back, 7, 0, (4096, 4096), &[]), 0)
            .request(1, &packet(back, 6, 0, (1 << 18, 0x4000), &[]), 0)
            .kick(1)
            .host(&[3, 1])
            .request(1, &packet(back, 3, 0, ROOM, &[]), 0)
            .kick(1)
            .done(),
        receive(Program::default().negotiate(1 << 29))
            .host(&[0, 10])
            .host(&[2, 1])
            .reset()
            .negotiate(0)
            .kick(2)
            .done(),
        Program::default()
            .negotiate(0)
            .request(2, &[], 4)
            .request(1, &packet((1, 2), 5, 0, ROOM, &[1]), 0)
            .kick(1)
            .done(),
        Program::default().negotiate(0).strange(1, 0x1_0000, 44, 0).kick(1).done(),
    ]
}
