//! Starts a VM: the VMM's process, the boot, the connection to the agent.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use husk_agent_client::Agent;
use husk_base::cgroup;
use husk_base::crash;
use husk_base::dirs;
use husk_base::id::SandboxId;
use husk_config::{Limits, VmHandler};
use husk_spawn::{Detached, Limit, Spawned};
use husk_vmm_api::{DiskConfig, HostPort, NetConfig, TemplateConfig, VmConfig, VsockConfig};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::template::Template;
use super::{
    Control, Error, Process, Vmm, control_path, exit_path, inspected_when_silent, record_file, slot_names,
    users, vsock_path,
};

/// Serial number of the disk with the containers' writable layers.
pub const SCRATCH_SERIAL: &str = "scratch";

/// Context id of every guest: each VM has a vsock device of its own, so the ids need
/// not differ.
const GUEST_CID: u32 = 3;

/// A network interface of a VM.
#[derive(Debug)]
pub struct Nic {
    /// The host's end of the interface.
    pub tap: OwnedFd,
    /// Hardware address that the guest's driver finds.
    pub mac: [u8; 6],
}

/// Hardware address of a VM's main interface until the agent gives it the
/// pod's own: locally administered, and never on a wire.
pub const MAIN_MAC: [u8; 6] = [0x02, 0x48, 0x75, 0x73, 0x6b, 0x00];

/// The largest packet that the device takes, bytes. The agent sets the MTU of the pod's
/// network.
const MAX_MTU: u16 = 65_521;

/// The VMM's log, in the VM's run directory.
pub(crate) const LOG: &str = "vmm.log";

/// A VM that is to be started.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The pod.
    pub id: &'a SandboxId,
    /// The handler that its client chose.
    pub handler: &'a VmHandler,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// How much the VM's devices may do.
    pub limits: &'a Limits,
    /// The directory for the VM's sockets; made here.
    pub run_dir: PathBuf,
    /// The file of the sandbox disk.
    pub scratch: PathBuf,
    /// The network interfaces, the pod's main one first.
    pub nics: Vec<Nic>,
    /// The control group of the VMM.
    pub cgroup: Option<PathBuf>,
}

/// A VM whose agent answers.
#[derive(Debug)]
pub struct Launched {
    /// The VMM.
    pub vmm: Vmm,
    /// The agent in the guest.
    pub agent: Agent,
    /// Process id of the VMM.
    pub vmm_pid: u32,
    /// Whether the VM is a clone of a template.
    pub cloned: bool,
    /// The time from the start of the VMM's process to the first entry into the guest.
    pub start: Duration,
    /// The time from there until the agent was ready; none for a clone, whose agent is ready
    /// already.
    pub kernel: Duration,
    /// The time from there to an open connection.
    pub connect: Duration,
}

/// Starts a VM, from a template if there is one, and returns when its agent answers.
///
/// # Errors
/// The step that failed. The processes and files that were made are left to
/// [`super::destroy`].
pub async fn launch(plan: &Plan<'_>, template: Option<Template>) -> Result<Launched, Error> {
    let started = Instant::now();
    let file = |stage, path: &Path| {
        let path = path.to_owned();
        move |cause: io::Error| Error::File { stage, path, cause }
    };
    // The VMM cannot open paths: all files are passed to it open.
    dirs::make(&plan.run_dir, dirs::ROOT_ONLY).map_err(file("make folder for sockets", &plan.run_dir))?;
    crash::point("VM folder made");
    let control_path = control_path(&plan.run_dir);
    let vsock_path = vsock_path(&plan.run_dir);
    let exit_path = exit_path(&plan.run_dir);

    let control = listen_seqpacket(&control_path).map_err(file("make control socket", &control_path))?;
    let vsock = UnixListener::bind(&vsock_path).map_err(file("make vsock socket", &vsock_path))?;
    let (ready, theirs) = ready_pair().map_err(file("make vsock socket", &vsock_path))?;
    let exit = record_file(&exit_path).map_err(file("make exit record", &exit_path))?;
    let log_path = plan.run_dir.join(LOG);
    let log = record_file(&log_path).map_err(file("make VMM log", &log_path))?;

    crash::point("VM sockets made");
    let user = users::claim(&plan.run_dir).map_err(file("choose the VMM's user", &plan.run_dir))?;
    if let Some(cgroup) = &plan.cgroup {
        cgroup::make(cgroup).map_err(file("make control group", cgroup))?;
    }
    // From here on only the VMM holds its socket: once it has ended, nothing listens.
    let started_vmm = |cause| Error::File { stage: "start VMM", path: plan.handler.vmm.clone(), cause };
    let Spawned { pid, pidfd } = spawn(plan, user, control, exit, log).map_err(started_vmm)?;
    crash::point("VMM started");
    let process = Process::watch(pidfd).map_err(started_vmm)?;

    let cloned = template.is_some();
    let (config, fds) = machine_config(plan, template, vsock, theirs)?;
    let control = Control::new(control_path);
    control.boot(config, fds).await?;
    let booted = Instant::now();
    crash::point("guest started");

    let vmm = Vmm::new(control.clone(), process, &plan.run_dir);
    let ends = Ends { vmm: &vmm };
    if !cloned {
        let limit = Duration::from_secs(plan.handler.boot_timeout_seconds);
        let spoken = async { agent_ready(ready).await.map_err(file("wait for agent", &vsock_path)) };
        ends.before(limit, spoken).await?;
    }
    let spoke = Instant::now();
    crash::point("agent ready");

    let agent_timeout = Duration::from_secs(plan.handler.agent_timeout_seconds);
    let connected = async { Agent::connect(vsock_path, agent_timeout).await.map_err(Error::Agent) };
    let agent = inspected_when_silent(ends.before(agent_timeout, connected).await?, &control);
    Ok(Launched {
        vmm,
        agent,
        vmm_pid: pid,
        cloned,
        start: booted - started,
        kernel: spoke - booted,
        connect: spoke.elapsed(),
    })
}

/// Watches for the VM's end, which may come, as a hang may, at any time of the start.
struct Ends<'a> {
    vmm: &'a Vmm,
}

impl Ends<'_> {
    /// Waits for a step of the start. It is an error if the VM ends before, or if the step
    /// takes longer than `limit`.
    async fn before<T>(
        &self,
        limit: Duration,
        step: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            done = step => done,
            exit = self.vmm.ended() => Err(match exit {
                Some(exit) => exit.into(),
                None => Error::Killed { log: self.vmm.last_output() },
            }),
            () = tokio::time::sleep(limit) => {
                self.vmm.control.log_inspection().await;
                Err(Error::Silent { seconds: limit.as_secs(), console: self.vmm.control.console().await })
            }
        }
    }
}

/// The connection on which the agent says that it is ready: our end and the VMM's.
fn ready_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// Returns when the agent says that it is ready, on the connection that it makes. If that
/// connection ends before, this waits on: the VM's end, or the time limit, has the reason.
async fn agent_ready(mut connection: UnixStream) -> io::Result<()> {
    let mut word = [0u8; 5];
    match connection.read_exact(&mut word).await {
        Ok(_) if &word == b"READY" => Ok(()),
        Ok(_) => Err(io::Error::other("its first word is another than READY")),
        Err(_) => std::future::pending().await,
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

/// The VMM's resource limits. It opens no files by itself once it faces its
/// guest, and no other process has its user.
fn limits(plan: &Plan<'_>) -> io::Result<[Limit; 5]> {
    /// Enough for the connections of the vsock device, and for the disks.
    const OPEN_FILES: u64 = 4096;
    /// Enough for two event loops, four threads for all disks, and KVM's own threads.
    const OTHER_THREADS: u64 = 24;
    let threads = u64::from(plan.vcpus) + OTHER_THREADS;
    // The VMM writes to the sandbox disk, or to the memory file of a template.
    let disk = std::fs::metadata(&plan.scratch)?.len();
    let memory = u64::from(plan.memory_mib) << 20;
    Ok([
        (libc::RLIMIT_FSIZE, disk.max(memory)),
        (libc::RLIMIT_NOFILE, OPEN_FILES),
        (libc::RLIMIT_NPROC, threads),
        (libc::RLIMIT_MEMLOCK, 0),
        (libc::RLIMIT_CORE, 0),
    ])
}

/// Starts the VMM, which outlives huskd.
fn spawn(plan: &Plan<'_>, user: u32, control: OwnedFd, exit: File, log: File) -> io::Result<Spawned> {
    const CONTROL_FD: &str = "3";
    const EXIT_FD: &str = "4";
    let mut program = Detached::new(&plan.handler.vmm)?
        .arguments(["--id", plan.id.as_str(), "--user", &user.to_string()])?
        .arguments(["--control-fd", CONTROL_FD, "--exit-fd", EXIT_FD])?
        .log(log)
        .descriptor(control)
        .descriptor(exit.into())
        .limits(limits(plan)?)
        .own_pids();
    if let Some(cgroup) = &plan.cgroup {
        program = program.cgroup(cgroup)?;
    }
    program.spawn()
}

fn machine_config(
    plan: &Plan<'_>,
    template: Option<Template>,
    vsock: UnixListener,
    ready: OwnedFd,
) -> Result<(VmConfig, Vec<OwnedFd>), Error> {
    let mut fds = Vec::<OwnedFd>::new();
    let mut pass = |fd: OwnedFd| {
        fds.push(fd);
        fds.len() - 1
    };
    let open = |stage, path: &Path, write: bool| {
        File::options().read(true).write(write).open(path).map(OwnedFd::from).map_err(|cause| Error::File {
            stage,
            path: path.into(),
            cause,
        })
    };
    let kernel = pass(open("open guest kernel", &plan.handler.kernel, false)?);
    let root = pass(open("open guest root filesystem", &plan.handler.rootfs, false)?);
    let scratch = pass(open("open sandbox disk", &plan.scratch, true)?);
    let limits = plan.limits;
    let mut nets = Vec::new();
    for nic in &plan.nics {
        let tap = nic.tap.try_clone().map_err(|cause| Error::File {
            stage: "pass tap",
            path: "/dev/net/tun".into(),
            cause,
        })?;
        nets.push(NetConfig {
            tap: pass(tap),
            mac: nic.mac,
            mtu: MAX_MTU,
            receive_limit: limits.network_in,
            send_limit: limits.network_out,
        });
    }
    let listener = pass(vsock.into());
    // The agent of a clone is ready already.
    let host_port = match template {
        None => Some(HostPort { port: husk_proto::agent::READY_PORT, socket: pass(ready) }),
        Some(_) => None,
    };
    let template = template.map(|template| TemplateConfig {
        state: pass(template.state.into()),
        memory: pass(template.memory.into()),
    });
    let config = VmConfig {
        vcpus: plan.vcpus,
        memory_mib: plan.memory_mib,
        kernel,
        cmdline: plan.handler.kernel_cmdline.clone(),
        root,
        disks: vec![DiskConfig {
            serial: SCRATCH_SERIAL.into(),
            file: scratch,
            read_only: false,
            limit: limits.disk,
            flush_limit: limits.flush,
        }],
        slots: slot_names(plan.handler.image_slots),
        slot_limit: limits.disk,
        console_limit: limits.console,
        nets,
        vsock: Some(VsockConfig { cid: GUEST_CID, listener, host_port, limit: limits.vsock }),
        fs: Some(husk_proto::agent::paths::SHARED_TAG.into()),
        fs_limit: limits.volumes,
        balloon: true,
        template,
    };
    Ok((config, fds))
}
