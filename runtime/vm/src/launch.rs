//! Starts a VM: the VMM's process, the boot, the connection to the agent.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use husk_agent_client::Agent;
use husk_base::blocking;
use husk_base::crash;
use husk_base::id::SandboxId;
use husk_config::{Limits, VmHandler};
use husk_vmm_api::{DiskConfig, HostPort, NetConfig, TemplateConfig, VmConfig, VsockConfig};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::template::Template;
use super::vmm_process::{Started, VmmProcess};
use super::{Control, Error, Process, Vmm, control_path, inspected_when_silent, slot_names, vsock_path};

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
    let vsock_path = vsock_path(&plan.run_dir);
    let process = VmmProcess::of(plan);
    let Started { process, vsock, kernel, rootfs, scratch } = blocking(move || process.start()).await?;
    let vmm_pid = process.pid;
    let process = Process::watch(process.pidfd).map_err(Error::file("start VMM", &plan.handler.vmm))?;

    let cloned = template.is_some();
    let (ready, theirs) = ready_pair().map_err(Error::file("make vsock socket", &vsock_path))?;
    let files = Files { kernel, rootfs, scratch, vsock: vsock.into(), ready: theirs };
    let (config, fds) = vm_config(plan, template, files)?;
    let control = Control::new(control_path(&plan.run_dir));
    control.boot(config, fds).await?;
    let booted = Instant::now();
    crash::point("guest started");

    let vmm = Vmm::new(control.clone(), process, &plan.run_dir);
    let ends = Ends { vmm: &vmm };
    if !cloned {
        let limit = Duration::from_secs(plan.handler.boot_timeout_seconds);
        let spoken = async { agent_ready(ready).await.map_err(Error::file("wait for agent", &vsock_path)) };
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
        vmm_pid,
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
                None => Error::Killed { log: self.vmm.last_output().await },
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

/// The open files that go with a VM's configuration.
struct Files {
    kernel: OwnedFd,
    rootfs: OwnedFd,
    scratch: OwnedFd,
    vsock: OwnedFd,
    /// The VMM's end of [`ready_pair`].
    ready: OwnedFd,
}

fn vm_config(
    plan: &Plan<'_>,
    template: Option<Template>,
    files: Files,
) -> Result<(VmConfig, Vec<OwnedFd>), Error> {
    let mut fds = Vec::<OwnedFd>::new();
    let mut pass = |fd: OwnedFd| {
        fds.push(fd);
        fds.len() - 1
    };
    let kernel = pass(files.kernel);
    let root = pass(files.rootfs);
    let scratch = pass(files.scratch);
    let limits = plan.limits;
    let mut nets = Vec::new();
    for nic in &plan.nics {
        let tap = nic.tap.try_clone().map_err(Error::file("pass tap", Path::new("/dev/net/tun")))?;
        nets.push(NetConfig {
            tap: pass(tap),
            mac: nic.mac,
            mtu: MAX_MTU,
            receive_limit: limits.network_in,
            send_limit: limits.network_out,
        });
    }
    let listener = pass(files.vsock);
    // The agent of a clone is ready already.
    let host_port = match template {
        None => Some(HostPort { port: husk_proto::agent::READY_PORT, socket: pass(files.ready) }),
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
