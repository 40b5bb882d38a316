//! Starts a machine: its VMM process, the boot, the first word of its agent.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream as StdUnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_vmm_api::{DiskConfig, HostPort, NetConfig, TemplateConfig, VmConfig, VsockConfig};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::template::Template;
use super::{
    Control, Error, Keeper, Machine, Process, Slots, Vmm, cgroup, control_path, exit_path, vsock_path,
};
use crate::agent::Agent;
use crate::config::Handler;
use crate::dirs;
use crate::id::SandboxId;

/// Serial number of the disk with the containers' writable layers.
pub const SCRATCH_SERIAL: &str = "scratch";

/// Context id of every guest: each has a vsock device of its own, so they need
/// not differ.
const GUEST_CID: u32 = 3;

/// A network interface of a machine.
#[derive(Debug)]
pub struct Nic {
    /// Where its packets go.
    pub tap: OwnedFd,
    /// Hardware address that its driver finds.
    pub mac: [u8; 6],
}

/// Hardware address of a machine's main interface until the agent gives it the
/// pod's own: locally administered, and never on a wire.
pub const MAIN_MAC: [u8; 6] = [0x02, 0x48, 0x75, 0x73, 0x6b, 0x00];

/// The largest packet that a network interface takes, bytes: the agent sets
/// what the pod's network takes.
const MAX_MTU: u16 = 65_521;

/// What the VMM says of itself, in the machine's folder.
const LOG: &str = "vmm.log";

/// What a machine is made of.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Whose it is.
    pub id: &'a SandboxId,
    /// Its kind.
    pub handler: &'a Handler,
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Where its sockets go; made here.
    pub run_dir: PathBuf,
    /// The file of its writable disk.
    pub scratch: PathBuf,
    /// Its network interfaces.
    pub nics: Vec<Nic>,
    /// The control group of the VMM.
    pub cgroup: Option<PathBuf>,
}

/// A machine that came up.
#[derive(Debug)]
pub struct Launched {
    /// It.
    pub machine: Arc<Machine>,
    /// Process id of its VMM.
    pub vmm_pid: u32,
    /// It is a clone of a template.
    pub cloned: bool,
    /// From the start of the process to the first entry into the guest.
    pub vmm: Duration,
    /// From there to the agent's first word; a clone's agent has spoken before.
    pub kernel: Duration,
    /// From there to an open connection.
    pub agent: Duration,
}

/// Where the machine's VMM will be in the control groups, see [`cgroup::path`].
#[must_use]
pub fn cgroup_for(parent: &str, id: &SandboxId) -> Option<PathBuf> {
    cgroup::path(parent, id)
}

/// Starts a machine, from a template if there is one, and returns when its
/// agent can be talked to.
///
/// # Errors
/// With the stage in it; whatever was started is left to [`super::destroy`].
pub async fn launch(plan: &Plan<'_>, template: Option<Template>) -> Result<Launched, Error> {
    let started = Instant::now();
    let file = |stage, path: &Path| {
        let path = path.to_owned();
        move |cause: io::Error| Error::File { stage, path, cause }
    };
    // The VMM has no use for paths: all that is in it is passed on open.
    dirs::make(&plan.run_dir, dirs::ROOT_ONLY).map_err(file("make folder for sockets", &plan.run_dir))?;
    let control_path = control_path(&plan.run_dir);
    let vsock_path = vsock_path(&plan.run_dir);
    let exit_path = exit_path(&plan.run_dir);

    let control = listen_seqpacket(&control_path).map_err(file("make control socket", &control_path))?;
    let vsock = UnixListener::bind(&vsock_path).map_err(file("make vsock socket", &vsock_path))?;
    let (ready, theirs) = ready_pair().map_err(file("make vsock socket", &vsock_path))?;
    let exit = File::create(&exit_path).map_err(file("make exit record", &exit_path))?;
    let log_path = plan.run_dir.join(LOG);
    let log = File::create(&log_path).map_err(file("make VMM log", &log_path))?;

    let (pid, process) =
        spawn(plan.id, plan.handler, &control, &exit, log).map_err(file("start VMM", &plan.handler.vmm))?;
    // The VMM alone listens now: once it has gone, nobody does.
    drop((control, exit));
    if let Some(cgroup) = &plan.cgroup {
        cgroup::enter(cgroup, pid).map_err(file("make control group", cgroup))?;
    }

    let cloned = template.is_some();
    let (config, fds) = machine_config(plan, template, vsock, theirs)?;
    let control = Control::new(control_path);
    control.boot(config, fds).await?;
    let booted = Instant::now();

    let vmm = Vmm::new(control.clone(), process, &plan.run_dir);
    let ends = Ends { vmm: &vmm };
    if !cloned {
        let limit = Duration::from_secs(plan.handler.boot_timeout_seconds);
        let spoken = async { agent_ready(ready).await.map_err(file("wait for agent", &vsock_path)) };
        ends.before(limit, spoken).await?;
    }
    let spoke = Instant::now();

    let agent_timeout = Duration::from_secs(plan.handler.agent_timeout_seconds);
    let connected = async { Agent::connect(vsock_path, agent_timeout).await.map_err(Error::Agent) };
    let agent = ends.before(agent_timeout, connected).await?.in_machine(control);
    let machine = Machine { keeper: Keeper::Vmm(vmm), agent, slots: Slots::new(plan.handler.image_slots) };
    Ok(Launched {
        machine: Arc::new(machine),
        vmm_pid: pid,
        cloned,
        vmm: booted - started,
        kernel: spoke - booted,
        agent: spoke.elapsed(),
    })
}

/// A machine may end, or hang, at any time while it comes up.
struct Ends<'a> {
    vmm: &'a Vmm,
}

impl Ends<'_> {
    /// Waits for a step of the machine's coming up, and says it if the machine
    /// ends before, or is still not there when the time is up.
    async fn before<T>(
        &self,
        limit: Duration,
        step: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            done = step => done,
            exit = self.vmm.ended() => Err(match exit {
                Some(exit) => exit.into(),
                None => {
                    let log = self.vmm.run_dir.join(LOG);
                    let cause = format!("the VMM died: see {}", log.display());
                    Error::Control { stage: "guest boot", cause }
                }
            }),
            () = tokio::time::sleep(limit) => {
                self.vmm.control.log_inspection().await;
                Err(Error::Silent { seconds: limit.as_secs(), console: self.vmm.control.console().await })
            }
        }
    }
}

/// Where the agent's first word comes out, and the VMM's end of it.
fn ready_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// The first word comes on a connection of the agent's own making. One that
/// ends before is no answer: the machine's end, or the time limit, says why.
async fn agent_ready(mut connection: UnixStream) -> io::Result<()> {
    let mut word = [0u8; 5];
    match connection.read_exact(&mut word).await {
        Ok(_) if &word == b"READY" => Ok(()),
        Ok(_) => Err(io::Error::other("its first word is another than READY")),
        Err(_) => std::future::pending().await,
    }
}

fn listen_seqpacket(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(16)?)?;
    Ok(socket)
}

/// Who the VMM of a machine runs as: nobody else, among so many that two
/// machines hardly ever share one. They are beyond what systemd gives to users
/// (up to 0x6fff_ffff).
fn user(id: &SandboxId) -> u32 {
    const FIRST: u32 = 0x7000_0000;
    const COUNT: u32 = 1 << 24;
    let hash = id.as_str().bytes().fold(0u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    FIRST + hash % COUNT
}

/// Starts the VMM in a session of its own, so that it outlives huskd, and has
/// it reaped when it ends.
fn spawn(
    id: &SandboxId,
    handler: &Handler,
    control: &OwnedFd,
    exit: &File,
    log: File,
) -> io::Result<(u32, Process)> {
    const CONTROL_FD: RawFd = 3;
    const EXIT_FD: RawFd = 4;
    let (control, exit) = (control.as_raw_fd(), exit.as_raw_fd());
    let mut command = Command::new(&handler.vmm);
    command
        .args(["--id", id.as_str(), "--user", &user(id).to_string()])
        .args(["--control-fd", &CONTROL_FD.to_string(), "--exit-fd", &EXIT_FD.to_string()])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: between fork and exec only system calls are made that are safe
    // there (setsid, dup3, fcntl), on descriptors that the parent keeps open.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            // Both go out of the way first: either may sit on 3 or 4 now.
            let control = above(control)?;
            let exit = above(exit)?;
            for (from, to) in [(control, CONTROL_FD), (exit, EXIT_FD)] {
                if libc::dup2(from, to) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    let pid = child.id();
    // Before anybody waits for it: until then the number is its own.
    let process = Process::open(pid).inspect_err(|_| {
        let _ = child.kill();
        let _ = child.wait();
    })?;
    std::thread::Builder::new().name("reap-vmm".into()).stack_size(16 * 1024).spawn(move || {
        let _ = child.wait();
    })?;
    Ok((pid, process))
}

/// A copy of the descriptor above those that the VMM expects, closed on exec.
fn above(fd: RawFd) -> io::Result<RawFd> {
    // SAFETY: fcntl with F_DUPFD_CLOEXEC touches no memory.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10) };
    if copy < 0 { Err(io::Error::last_os_error()) } else { Ok(copy) }
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
    let mut nets = Vec::new();
    for nic in &plan.nics {
        let tap = nic.tap.try_clone().map_err(|cause| Error::File {
            stage: "pass tap",
            path: "/dev/net/tun".into(),
            cause,
        })?;
        nets.push(NetConfig { tap: pass(tap), mac: nic.mac, mtu: MAX_MTU });
    }
    let listener = pass(vsock.into());
    // A clone's agent has spoken before.
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
        disks: vec![DiskConfig { serial: SCRATCH_SERIAL.into(), file: scratch, read_only: false }],
        slots: Slots::names(plan.handler.image_slots),
        nets,
        vsock: Some(VsockConfig { cid: GUEST_CID, listener, host_port }),
        fs: Some(husk_proto::agent::paths::SHARED_TAG.into()),
        balloon: true,
        template,
    };
    Ok((config, fds))
}
