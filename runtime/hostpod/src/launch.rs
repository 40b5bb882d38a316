//! Starts the supervisor of a host pod.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_agent_client::Agent;
use husk_base::{blocking, cgroup, crash, dirs};
use husk_config::HostHandler;
use husk_spawn::Detached;

use super::{
    Error, Supervisor, cgroup_link, connect, file, log_path, make_mount, socket_path, supervisor_group,
};

/// A host pod that is to be started.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The handler that its client chose.
    pub handler: &'a HostHandler,
    /// The directory for the pod's socket, bundles and mounts; made here.
    pub run_dir: PathBuf,
    /// The directory for the writable layers of containers; made here.
    pub layers: PathBuf,
    /// The pod's control group; made here.
    pub cgroup: PathBuf,
    /// The pod's network namespace; `None` for the host's.
    pub netns: Option<PathBuf>,
    /// Whether the pod has an IPC namespace of its own.
    pub own_ipc: bool,
    /// The host's group for the group 0 of the pod's user namespace, if it has one.
    pub group: Option<u32>,
}

/// Starts the supervisor, and returns when it answers, with its process id.
///
/// # Errors
/// The step that failed. The processes and files that were made are left to
/// [`super::destroy`].
pub async fn launch(plan: &Plan<'_>) -> Result<(Supervisor, Agent, u32), Error> {
    let run_dir = &plan.run_dir;
    let own_group = supervisor_group(&plan.cgroup);
    let (folder, layers, cgroup, group) =
        (run_dir.clone(), plan.layers.clone(), plan.cgroup.clone(), plan.group);
    blocking(move || make_folders(&folder, &layers, &cgroup, group)).await?;
    let socket = socket_path(run_dir);
    let socket = UnixListener::bind(&socket).map_err(file("make socket", &socket))?;
    let log = log_path(run_dir);
    let log = tokio::fs::File::create(&log).await.map_err(file("make log", &log))?.into_std().await;

    // From here on only the supervisor holds the socket: once it has ended, nothing listens.
    let pid = spawn(plan, &own_group, socket, log).map_err(file("start supervisor", &plan.handler.agent))?;
    crash::point("supervisor started");
    let timeout = Duration::from_secs(plan.handler.agent_timeout_seconds);
    let agent = connect(run_dir, timeout).await?;
    let supervisor = Supervisor { run_dir: run_dir.clone(), cgroup: plan.cgroup.clone() };
    Ok((supervisor, agent, pid))
}

/// Makes the pod's folders and control groups. The call blocks.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn make_folders(run_dir: &Path, layers: &Path, cgroup: &Path, group: Option<u32>) -> Result<(), Error> {
    // The bundles hold the containers' environment, which may be secret.
    for path in [run_dir, layers] {
        dirs::make(path, dirs::ROOT_ONLY).map_err(file("make folder", path))?;
    }
    if let Some(group) = group {
        // Users of the namespace pass through the directory to their own files, by name.
        chown(run_dir, None, Some(group))
            .and_then(|()| fs::set_permissions(run_dir, fs::Permissions::from_mode(0o710)))
            .map_err(file("open to the pod's users", run_dir))?;
    }
    let link = cgroup_link(run_dir);
    std::os::unix::fs::symlink(cgroup, &link).map_err(file("make link", &link))?;
    crash::point("folder of a host pod made");
    make_mount(run_dir).map_err(file("make a mount of", run_dir))?;
    cgroup::make(cgroup).map_err(file("make control group", cgroup))?;
    let own_group = supervisor_group(cgroup);
    fs::create_dir_all(&own_group).map_err(file("make control group", &own_group))
}

/// Starts the supervisor in a control group of its own, so that it can be ended with its pod
/// from its first instruction on. It keeps huskd's resource limits, which its containers
/// inherit.
fn spawn(plan: &Plan<'_>, group: &Path, socket: UnixListener, log: File) -> io::Result<u32> {
    let mut program = Detached::new(&plan.handler.agent)?
        .arguments(["--host", "--directory"])?
        .arguments([&plan.run_dir])?
        .arguments(["--layers"])?
        .arguments([&plan.layers])?
        .arguments(["--cgroup"])?
        .arguments([&plan.cgroup])?
        .arguments(["--runc"])?
        .arguments([&plan.handler.runc])?
        .log(log)
        .descriptor(socket.into())
        .cgroup(group)?;
    if let Some(netns) = &plan.netns {
        program = program.arguments(["--netns"])?.arguments([netns])?;
    }
    if plan.own_ipc {
        program = program.arguments(["--own-ipc"])?;
    }
    Ok(program.spawn()?.pid)
}
