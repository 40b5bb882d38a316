//! RPCs that make the machine a pod, and end it.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use husk_proto::agent::{
    AdjustClockRequest, AdjustClockResponse, CreateSandboxRequest, CreateSandboxResponse, GuestFile,
    RemoveContainerRequest, ShutdownResponse, UserNamespace,
};
use husk_proto::agent::{Dns, paths};
use nix::mount::MsFlags;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::{Agent, Error, Stage, container};
use crate::container::bundle::SCRATCH;
use crate::guest::mode::Mode;
use crate::guest::trim::Disk;
use crate::guest::{clock, mounts};
use crate::id;
use crate::pod::{etc, netlink, ns, sysctl, userns};

const SHM_DEFAULT: u64 = 64 * 1024 * 1024;

/// Most bytes of a host name (`HOST_NAME_MAX`).
const MAX_HOSTNAME: usize = 64;

/// How long all containers together may take to end at a shut-down, including
/// their `poststop` hooks.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(20);

/// Serves `CreateSandbox`.
pub async fn create(
    agent: Arc<Agent>,
    request: CreateSandboxRequest,
) -> Result<CreateSandboxResponse, Error> {
    id::check("sandbox_id", &request.sandbox_id)?;
    if request.hostname.len() > MAX_HOSTNAME {
        return Err(Error::Invalid(format!("the host name has more than {MAX_HOSTNAME} bytes")));
    }
    let addresses = netlink::addresses(&request.interfaces).invalid("interfaces")?;
    let mut hosts = etc::hosts(&request.hostname, &addresses).invalid("hostname")?;
    let mut resolv_conf = etc::resolv_conf(request.dns.as_ref().unwrap_or(&Dns::default())).invalid("dns")?;
    if let Some(host) = agent.mode.host() {
        // A pod in the host's network uses the host's names.
        if host.netns.is_none() {
            hosts = fs::read_to_string("/etc/hosts").unwrap_or(hosts);
        }
        if request.dns.is_none() {
            resolv_conf = fs::read_to_string("/etc/resolv.conf").unwrap_or(resolv_conf);
        }
    }
    for hook in &request.hooks {
        id::check("hooks.name", &hook.name)?;
    }
    if let Some(wanted) = &request.user_namespace {
        userns::check(wanted).invalid("user_namespace")?;
    }
    if agent.mode.host().is_none() {
        clock::check_seed(&request.entropy).invalid("entropy")?;
    }
    // A half-made pod cannot be made again: nothing after this line is tried
    // twice.
    if agent.sandbox.set(OnceLock::new()).is_err() {
        return Err(Error::Precondition("the sandbox was created before".into()));
    }

    match *agent.mode {
        Mode::Guest => set_up_machine(&agent, &request).await?,
        // On the host only the pod's namespaces are set up.
        Mode::Host(_) => {}
    }
    if !request.hostname.is_empty() && agent.mode.host().is_none_or(|host| host.netns.is_some()) {
        nix::unistd::sethostname(&request.hostname).stage("set the host name")?;
    }
    let shm = agent.mode.at(paths::SHM);
    mounts::make_mount_point(&shm).stage("mount shm")?;
    for (path, text) in [
        (paths::HOSTS, hosts),
        (paths::HOSTNAME, format!("{}\n", request.hostname)),
        (paths::RESOLV_CONF, resolv_conf),
    ] {
        let path = agent.mode.at(path);
        fs::write(&path, text)
            .map_err(|error| format!("{}: {error}", path.display()))
            .stage("write the pod's files")?;
    }
    let shm_size = if request.shm_size == 0 { SHM_DEFAULT } else { request.shm_size };
    let private = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mounts::mount("shm", &shm, "tmpfs", private, &format!("mode=1777,size={shm_size}")).stage("mount shm")?;

    // This comes after the interfaces, because some parameters belong to them.
    // Others belong to the IPC namespace, which is a new one if there is a user
    // namespace.
    let (of_ipc, others): (Vec<_>, Vec<_>) = (request.sysctls.clone().into_iter())
        .partition(|(name, _)| request.user_namespace.is_some() && sysctl::is_of_ipc(name));
    for name in request.sysctls.keys() {
        sysctl::check(name, agent.mode.host()).invalid("sysctls")?;
    }
    // The defaults come first, so that the client's values override them.
    for (name, value) in sysctl::open_to_users(agent.mode.host()) {
        sysctl::set(name, value).stage("open the network to the pod's users")?;
    }
    for (name, value) in &others {
        sysctl::set(name, value).invalid("sysctls")?;
    }
    if let Some(wanted) = &request.user_namespace {
        if agent.mode.host().is_some() {
            // The host's sysfs shows the host's network, and the pod's users may not mount another one, because
            // they do not own the pod's network.
            let sys = agent.mode.at(paths::SYS);
            mounts::make_mount_point(&sys).stage("mount sysfs")?;
            mounts::mount("sysfs", &sys, "sysfs", private, "").stage("mount sysfs")?;
        }
        map_users(&agent, wanted).await?;
        if let Some((root, _)) = userns::owner(wanted).filter(|_| !of_ipc.is_empty()) {
            sysctl::set_in(&agent.mode.at(paths::IPC_NAMESPACE), root, of_ipc).invalid("sysctls")?;
        }
    } else if request.shared_pid_namespace {
        share_pid_namespace(&agent).await?;
    }

    if let Some(created) = agent.sandbox.get() {
        let _ = created.set(());
    }
    let release = nix::sys::utsname::uname().stage("uname")?.release().to_string_lossy().into_owned();
    Ok(CreateSandboxResponse { kernel_release: release, agent_version: env!("CARGO_PKG_VERSION").into() })
}

/// Serves `AdjustClock`.
pub fn adjust_clock(agent: &Agent, request: &AdjustClockRequest) -> Result<AdjustClockResponse, Error> {
    if agent.mode.host().is_some() {
        return Err(Error::Precondition("the clock is the host's".into()));
    }
    clock::adjust(request.by_nanos).stage("adjust the clock")?;
    Ok(AdjustClockResponse { time_unix_nanos: clock::unix_nanos() })
}

/// Sets up the clock, the disk and the interfaces of a machine.
async fn set_up_machine(agent: &Agent, request: &CreateSandboxRequest) -> Result<(), Error> {
    // A clone of a template has the template's clock and random numbers.
    if request.time_unix_nanos != 0 {
        clock::set(request.time_unix_nanos).stage("set the clock")?;
    }
    clock::seed(&request.entropy).stage("seed random numbers")?;

    let device = agent.disks.wait_for(&request.scratch_serial).await.stage("find the scratch disk")?;
    // The disk lives no longer than the pod: without barriers the host need not
    // flush data that will be deleted.
    mounts::make_mount_point(Path::new(SCRATCH)).stage("mount the scratch disk")?;
    mounts::mount(&device.to_string_lossy(), SCRATCH, "ext4", MsFlags::MS_NOATIME, "barrier=0")
        .stage("mount the scratch disk")?;
    let trimming = tokio::spawn(Disk::new(&device, Path::new(SCRATCH)).keep_trimmed());
    let _ = agent.trimming.set(AbortOnDropHandle::new(trimming));

    netlink::configure(&request.interfaces, &request.routes).await.map_err(|error| match error {
        netlink::Error::Invalid(what) => Error::Invalid(format!("network: {what}")),
        other => Error::Failed { stage: "network", cause: other.to_string() },
    })?;
    write_hooks(&request.hooks).stage("write hooks")
}

/// Fails until `CreateSandbox` has succeeded.
pub fn check_created(agent: &Agent) -> Result<(), Error> {
    match agent.sandbox.get().and_then(OnceLock::get) {
        Some(()) => Ok(()),
        None => Err(Error::Precondition("the sandbox was not created".into())),
    }
}

/// Writes the programs of hooks to the paths that the containers'
/// configurations name.
fn write_hooks(hooks: &[GuestFile]) -> io::Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(paths::HOOKS)?;
    for hook in hooks {
        let path = Path::new(paths::HOOKS).join(&hook.name);
        fs::write(&path, &hook.content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Makes the pod's user namespace.
async fn map_users(agent: &Agent, wanted: &UserNamespace) -> Result<(), Error> {
    let mut made = agent.pid_namespace.lock().await;
    userns::create(&agent.reaper, wanted, &agent.mode).stage("create the user namespace")?;
    *made = true;
    if let Some(root) = userns::owner(wanted) {
        let _ = agent.mapped_root.set(root);
    }
    Ok(())
}

/// Makes the pid namespace that containers of the pod share, unless there is
/// one.
pub async fn share_pid_namespace(agent: &Agent) -> Result<(), Error> {
    // The lock is held to the end, because two containers may be the first to
    // need it.
    let mut made = agent.pid_namespace.lock().await;
    if !*made {
        ns::create_pid_namespace(&agent.reaper, &agent.mode.at(paths::PID_NAMESPACE))
            .stage("create the shared pid namespace")?;
        *made = true;
    }
    Ok(())
}

/// Serves `Shutdown`: the machine goes down, or the supervisor ends, once the
/// answer is sent.
pub async fn shutdown(agent: Arc<Agent>) -> Result<ShutdownResponse, Error> {
    let containers = agent.containers.all();
    for container in &containers {
        container.cgroup.kill();
    }
    let removals = containers
        .iter()
        .map(|it| container::remove(agent.clone(), RemoveContainerRequest { container_id: it.id.clone() }));
    // Containers that have not ended now end with the machine.
    match timeout(SHUTDOWN_DEADLINE, futures::future::join_all(removals)).await {
        Ok(removed) => {
            for error in removed.into_iter().filter_map(Result::err) {
                tracing::warn!(%error, "failed to remove a container at the shut-down");
            }
        }
        Err(_) => tracing::warn!(limit_s = SHUTDOWN_DEADLINE.as_secs(), "containers did not end in time"),
    }
    if agent.mode.host().is_none()
        && let Err(error) = mounts::unmount(Path::new(SCRATCH))
    {
        tracing::warn!(%error, "failed to unmount the sandbox disk");
    }
    agent.power_off.notify_one();
    Ok(ShutdownResponse {})
}
