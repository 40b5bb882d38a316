//! Starts the supervisor of a host pod.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use super::{Error, Supervisor, cgroup_link, file, last_lines, log_path, make_mount, socket_path};
use crate::agent::Agent;
use crate::config::Handler;
use crate::dirs;
use crate::vm::{Keeper, Machine, Slots, cgroup};

/// What a host pod is made of.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Its kind.
    pub handler: &'a Handler,
    /// Where its socket, bundles and mounts go; made here.
    pub run_dir: PathBuf,
    /// Where the writable layers of its containers go; made here.
    pub layers: PathBuf,
    /// Its control group; made here.
    pub cgroup: PathBuf,
    /// Its network namespace; none for the host's.
    pub netns: Option<PathBuf>,
    /// IPC is its own.
    pub own_ipc: bool,
    /// The host's group for the group 0 of its user namespace, if it has one.
    pub group: Option<u32>,
}

/// Starts the supervisor, and returns when it can be talked to, with its
/// process id.
///
/// # Errors
/// With the stage in it; whatever was started is left to [`super::destroy`].
pub async fn launch(plan: &Plan<'_>) -> Result<(Arc<Machine>, u32), Error> {
    let run_dir = &plan.run_dir;
    // The bundles hold what containers are told in secret.
    for path in [run_dir, &plan.layers] {
        dirs::make(path, dirs::ROOT_ONLY).map_err(file("make folder", path))?;
    }
    if let Some(group) = plan.group {
        // Its containers find their way to their own files, by name.
        chown(run_dir, None, Some(group))
            .and_then(|()| fs::set_permissions(run_dir, fs::Permissions::from_mode(0o710)))
            .map_err(file("open to the pod's users", run_dir))?;
    }
    let link = cgroup_link(run_dir);
    std::os::unix::fs::symlink(&plan.cgroup, &link).map_err(file("make link", &link))?;
    make_mount(run_dir).map_err(file("make a mount of", run_dir))?;
    cgroup::make(&plan.cgroup).map_err(file("make control group", &plan.cgroup))?;
    let own_group = plan.cgroup.join("supervisor");
    std::fs::create_dir_all(&own_group).map_err(file("make control group", &own_group))?;
    let socket_path = socket_path(run_dir);
    let socket = UnixListener::bind(&socket_path).map_err(file("make socket", &socket_path))?;
    let log = log_path(run_dir);
    let log = File::create(&log).map_err(file("make log", &log))?;

    let pid = spawn(plan, &own_group, &socket, log).map_err(file("start supervisor", &plan.handler.agent))?;
    // The supervisor alone listens now: once it has gone, nobody does.
    drop(socket);
    let timeout = Duration::from_secs(plan.handler.agent_timeout_seconds);
    let failed = |cause| Error::Supervisor { cause, log: last_lines(run_dir) };
    let agent = Agent::connect(socket_path, timeout).await.map_err(failed)?;
    let supervisor = Supervisor { run_dir: run_dir.clone(), cgroup: plan.cgroup.clone() };
    let machine = Machine { keeper: Keeper::Supervisor(supervisor), agent, slots: Slots::unlimited() };
    Ok((Arc::new(machine), pid))
}

/// Starts it in a session and a control group of its own, so that it outlives
/// huskd and can be ended with its pod from its first instruction on; and has
/// it reaped.
fn spawn(plan: &Plan<'_>, group: &Path, socket: &UnixListener, log: File) -> io::Result<u32> {
    const SOCKET_FD: RawFd = 3;
    let membership = File::options().write(true).open(group.join("cgroup.procs"))?;
    let (socket, group) = (socket.as_raw_fd(), membership.as_raw_fd());
    let mut command = Command::new(&plan.handler.agent);
    command
        .arg("--host")
        .arg("--directory")
        .arg(&plan.run_dir)
        .arg("--layers")
        .arg(&plan.layers)
        .arg("--cgroup")
        .arg(&plan.cgroup)
        .arg("--runc")
        .arg(&plan.handler.runc);
    if let Some(netns) = &plan.netns {
        command.arg("--netns").arg(netns);
    }
    if plan.own_ipc {
        command.arg("--own-ipc");
    }
    command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    // SAFETY: between fork and exec only system calls are made that are safe
    // there (setsid, write, dup2, fcntl), on descriptors that the parent keeps
    // open.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            // "0" is the process that writes it.
            if libc::write(group, c"0".as_ptr().cast(), 1) != 1 {
                return Err(io::Error::last_os_error());
            }
            // Onto itself, dup2 would leave the descriptor to be closed.
            let done = if socket == SOCKET_FD {
                libc::fcntl(socket, libc::F_SETFD, 0)
            } else {
                libc::dup2(socket, SOCKET_FD)
            };
            if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let mut child = command.spawn()?;
    let pid = child.id();
    std::thread::Builder::new().name("reap-agent".into()).stack_size(16 * 1024).spawn(move || {
        let _ = child.wait();
    })?;
    Ok(pid)
}
