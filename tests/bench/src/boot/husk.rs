//! `husk-vmm`, started as huskd starts it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use husk_proto::agent::READY_PORT;
use husk_vmm_api::{HostPort, Request, Response, VmConfig, VsockConfig, socket};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket as new_socket,
};

use super::{Guest, Running, Vmm, Word, quiet};

const CONTROL_FD: RawFd = 3;
const EXIT_FD: RawFd = 4;

pub struct Husk {
    pub program: PathBuf,
}

impl Vmm for Husk {
    fn name(&self) -> &'static str {
        "husk"
    }

    fn start(&self, guest: &Guest, folder: &Path) -> anyhow::Result<Running> {
        let address = UnixAddr::new(&folder.join("control")).context("name the control socket")?;
        let listener = seqpacket().context("make the control socket")?;
        bind(listener.as_raw_fd(), &address).context("bind the control socket")?;
        listen(&listener, Backlog::new(1)?).context("listen on the control socket")?;
        let exit = File::create(folder.join("exit")).context("make the exit record")?;

        let child = self.spawn(&listener, &exit).context("start husk-vmm")?;
        let control = seqpacket().context("make a socket")?;
        let (word, theirs) = UnixStream::pair().context("make a socket")?;
        let mut running = Running { child, word: Word::Stream(word), _control: None };
        connect(control.as_raw_fd(), &address).context("connect to husk-vmm")?;
        boot(&control, guest, folder, theirs)?;
        running._control = Some(control);
        Ok(running)
    }
}

impl Husk {
    fn spawn(&self, listener: &OwnedFd, exit: &File) -> std::io::Result<std::process::Child> {
        let (listener, exit) = (listener.as_raw_fd(), exit.as_raw_fd());
        let mut command = quiet(&self.program);
        // This user owns nothing.
        command.args(["--id", "bench", "--user", "1879048193"]);
        command.args(["--control-fd", &CONTROL_FD.to_string(), "--exit-fd", &EXIT_FD.to_string()]);
        // SAFETY: between fork and exec only fcntl and dup2 are called, which
        // are safe there, on descriptors that this process keeps open.
        unsafe {
            command.pre_exec(move || {
                // Out of the way first: either may sit on 3 or 4 now.
                let pairs = [(above(listener)?, CONTROL_FD), (above(exit)?, EXIT_FD)];
                for (from, to) in pairs {
                    if libc::dup2(from, to) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command.spawn()
    }
}

fn boot(control: &OwnedFd, guest: &Guest, folder: &Path, ready: UnixStream) -> anyhow::Result<()> {
    let kernel = File::open(&guest.kernel).context("open the kernel")?;
    let rootfs = File::open(&guest.rootfs).context("open the root file system")?;
    let listener = UnixListener::bind(folder.join("v")).context("make the vsock socket")?;
    let config = VmConfig {
        vcpus: 1,
        memory_mib: guest.memory_mib,
        kernel: 0,
        cmdline: String::new(),
        root: 1,
        disks: Vec::new(),
        slots: Vec::new(),
        slot_limit: None,
        console_limit: None,
        nets: Vec::new(),
        vsock: Some(VsockConfig {
            cid: 3,
            listener: 2,
            host_port: Some(HostPort { port: READY_PORT, socket: 3 }),
            limit: None,
        }),
        fs: None,
        fs_limit: None,
        balloon: false,
        template: None,
    };
    let fds = [kernel.as_fd(), rootfs.as_fd(), listener.as_fd(), ready.as_fd()];
    socket::send(control.as_fd(), &Request::Boot(Box::new(config)), &fds).context("ask for the boot")?;
    match socket::receive::<Response>(control.as_fd()).context("hear husk-vmm")? {
        Some((Response::Ok, _)) => Ok(()),
        Some((Response::Error { stage, message }, _)) => bail!("{stage}: {message}"),
        other => bail!("husk-vmm answers {other:?}"),
    }
}

fn seqpacket() -> nix::Result<OwnedFd> {
    new_socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
}

/// A copy of the descriptor above those that husk-vmm expects, closed on exec.
fn above(fd: RawFd) -> std::io::Result<RawFd> {
    // SAFETY: fcntl with F_DUPFD_CLOEXEC touches no memory.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10) };
    if copy < 0 { Err(std::io::Error::last_os_error()) } else { Ok(copy) }
}
