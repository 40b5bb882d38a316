//! Starts the process of a VMM, and opens all that it gets.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use husk_base::crash;
use husk_base::id::SandboxId;
use husk_base::{cgroup, dirs};
use husk_spawn::{Detached, Limit, Spawned};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use super::launch::{LOG, Plan};
use super::{Error, control_path, exit_path, record_file, users, vsock_path};

/// A VMM that is to be started.
pub(crate) struct VmmProcess {
    id: SandboxId,
    program: PathBuf,
    kernel: PathBuf,
    rootfs: PathBuf,
    scratch: PathBuf,
    run_dir: PathBuf,
    cgroup: Option<PathBuf>,
    vcpus: u8,
    memory_mib: u32,
}

/// A VMM's process, and the files that it gets with its configuration, because it cannot
/// open paths.
pub(crate) struct Started {
    pub process: Spawned,
    pub vsock: UnixListener,
    pub kernel: OwnedFd,
    pub rootfs: OwnedFd,
    pub scratch: OwnedFd,
}

impl VmmProcess {
    /// The VMM of a VM.
    pub fn of(plan: &Plan<'_>) -> Self {
        Self {
            id: plan.id.clone(),
            program: plan.handler.vmm.clone(),
            kernel: plan.handler.kernel.clone(),
            rootfs: plan.handler.rootfs.clone(),
            scratch: plan.scratch.clone(),
            run_dir: plan.run_dir.clone(),
            cgroup: plan.cgroup.clone(),
            vcpus: plan.vcpus,
            memory_mib: plan.memory_mib,
        }
    }

    /// Makes the VM's sockets and starts the VMM, which outlives huskd. The call blocks.
    ///
    /// # Errors
    /// The step that failed. What was made is left to [`super::destroy`].
    pub fn start(self) -> Result<Started, Error> {
        let open = |stage, path: &Path, write: bool| {
            File::options()
                .read(true)
                .write(write)
                .open(path)
                .map(OwnedFd::from)
                .map_err(Error::file(stage, path))
        };
        let kernel = open("open guest kernel", &self.kernel, false)?;
        let rootfs = open("open guest root filesystem", &self.rootfs, false)?;
        let scratch = open("open sandbox disk", &self.scratch, true)?;

        dirs::make(&self.run_dir, dirs::ROOT_ONLY)
            .map_err(Error::file("make folder for sockets", &self.run_dir))?;
        crash::point("VM folder made");
        let control_path = control_path(&self.run_dir);
        let vsock_path = vsock_path(&self.run_dir);
        let exit_path = exit_path(&self.run_dir);
        let log_path = self.run_dir.join(LOG);
        let control =
            listen_seqpacket(&control_path).map_err(Error::file("make control socket", &control_path))?;
        let vsock = UnixListener::bind(&vsock_path).map_err(Error::file("make vsock socket", &vsock_path))?;
        let exit = record_file(&exit_path).map_err(Error::file("make exit record", &exit_path))?;
        let log = record_file(&log_path).map_err(Error::file("make VMM log", &log_path))?;
        crash::point("VM sockets made");

        let user =
            users::claim(&self.run_dir).map_err(Error::file("choose the VMM's user", &self.run_dir))?;
        if let Some(cgroup) = &self.cgroup {
            cgroup::make(cgroup).map_err(Error::file("make control group", cgroup))?;
        }
        // From here on only the VMM holds its socket: once it has ended, nothing listens.
        let process =
            self.spawn(user, control, exit, log).map_err(Error::file("start VMM", &self.program))?;
        crash::point("VMM started");
        Ok(Started { process, vsock, kernel, rootfs, scratch })
    }

    fn spawn(&self, user: u32, control: OwnedFd, exit: File, log: File) -> io::Result<Spawned> {
        const CONTROL_FD: &str = "3";
        const EXIT_FD: &str = "4";
        let mut program = Detached::new(&self.program)?
            .arguments(["--id", self.id.as_str(), "--user", &user.to_string()])?
            .arguments(["--control-fd", CONTROL_FD, "--exit-fd", EXIT_FD])?
            .log(log)
            .descriptor(control)
            .descriptor(exit.into())
            .limits(self.limits()?)
            .own_pids();
        if let Some(cgroup) = &self.cgroup {
            program = program.cgroup(cgroup)?;
        }
        program.spawn()
    }

    /// The VMM's resource limits. It opens no files by itself once it faces its
    /// guest, and no other process has its user.
    fn limits(&self) -> io::Result<[Limit; 5]> {
        /// Enough for the connections of the vsock device, and for the disks.
        const OPEN_FILES: u64 = 4096;
        /// Enough for two event loops, four threads for all disks, and KVM's own threads.
        const OTHER_THREADS: u64 = 24;
        let threads = u64::from(self.vcpus) + OTHER_THREADS;
        // The VMM writes to the sandbox disk, or to the memory file of a template.
        let disk = std::fs::metadata(&self.scratch)?.len();
        let memory = u64::from(self.memory_mib) << 20;
        Ok([
            (libc::RLIMIT_FSIZE, disk.max(memory)),
            (libc::RLIMIT_NOFILE, OPEN_FILES),
            (libc::RLIMIT_NPROC, threads),
            (libc::RLIMIT_MEMLOCK, 0),
            (libc::RLIMIT_CORE, 0),
        ])
    }
}

/// Makes a socket that listens as a VMM's control socket does.
///
/// # Errors
/// The file system's error.
pub fn listen_seqpacket(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(16)?)?;
    Ok(socket)
}
