//! Pods of plain host containers: the only code that starts `husk-agent` on the
//! host.
//!
//! Such a pod has no VM. Its supervisor, one `husk-agent` process, has
//! entered the pod's namespaces and runs its containers with the host's runc.
//! The supervisor outlives huskd as a VMM does. All processes of the pod are in one control
//! group, and the pod is ended by killing that group.
//!
//! The supervisor's mounts are in its own mount namespace, below the pod's
//! run directory. That directory is a mount of its own, so that no mount below it
//! appears on the host. On the host the directory holds plain files.

#![cfg_attr(test, allow(clippy::disallowed_methods))]
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_agent_client::{self as agent, Agent};
use husk_base::{blocking, cgroup, crash, remove_tree};
use husk_proto::agent::LIVENESS_PORT;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

pub mod launch;

/// The longest time that processes may take to end once they are killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// How many lines of a supervisor's log an error quotes at most.
const LAST_LINES: usize = 8;

/// Something went wrong with the supervisor of a host pod.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of the pod.
    #[error("host pod: {stage}: {path}: {cause}")]
    File {
        /// The step that failed.
        stage: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        cause: io::Error,
    },
    /// The host has no cgroup v2.
    #[error(
        "host pod: there is no cgroup v2 at /sys/fs/cgroup, which host containers need: \
         boot with systemd.unified_cgroup_hierarchy=1"
    )]
    NoCgroups,
    /// The supervisor does not answer.
    #[error("host pod: start supervisor: {cause}{}", quoted(log))]
    Supervisor {
        /// The error of the connection.
        cause: String,
        /// The end of the supervisor's log.
        log: String,
    },
    /// SIGKILL does not end the processes of a control group.
    #[error("host pod: processes of {0} do not end within {limit} s of SIGKILL", limit = KILL_TIMEOUT.as_secs())]
    Alive(PathBuf),
}

fn file(stage: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::File { stage, path, cause }
}

fn quoted(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!(": {log}") }
}

/// The supervisor of a host pod, known by its socket and its control group.
#[derive(Clone, Debug)]
pub struct Supervisor {
    run_dir: PathBuf,
    cgroup: PathBuf,
}

impl Supervisor {
    /// Returns when the supervisor has ended, with the end of its log. Its containers are
    /// killed then, because no process could wait for them.
    pub async fn wait(&self) -> String {
        let socket = socket_path(&self.run_dir);
        loop {
            match UnixStream::connect(&socket).await {
                Err(error) if is_gone(&error, &self.cgroup) => break,
                // The socket's backlog may be full, which is no end.
                Err(_) => {}
                Ok(probe) => {
                    drop(probe);
                    if let Ok(mut life) = agent::connect_port(&socket, LIVENESS_PORT).await {
                        let _ = life.read_u8().await;
                        continue;
                    }
                }
            }
            sleep(Duration::from_millis(500)).await;
        }
        if let Err(error) = cgroup::kill(&self.cgroup) {
            tracing::warn!(cgroup = %self.cgroup.display(), %error, "failed to end the processes that a supervisor left behind");
        }
        format!("the pod's supervisor (husk-agent) ended{}", quoted(&last_lines(&self.run_dir).await))
    }
}

/// Whether an error at a supervisor's socket means that it has ended. A supervisor whose socket
/// was removed lives for as long as there is a process in its group.
fn is_gone(error: &io::Error, cgroup: &Path) -> bool {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => true,
        io::ErrorKind::NotFound => !cgroup::is_populated(&supervisor_group(cgroup)),
        _ => false,
    }
}

/// The control group of the supervisor alone.
fn supervisor_group(cgroup: &Path) -> PathBuf {
    cgroup.join("supervisor")
}

/// Whether the supervisor of `run_dir` lives. One that is slow to answer does.
pub async fn lives(run_dir: &Path) -> bool {
    let cgroup = tokio::fs::read_link(cgroup_link(run_dir)).await.unwrap_or_default();
    !UnixStream::connect(socket_path(run_dir)).await.is_err_and(|error| is_gone(&error, &cgroup))
}

fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

fn log_path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.log")
}

/// The link to the pod's control group, by which the pod can be ended even without
/// a record.
fn cgroup_link(run_dir: &Path) -> PathBuf {
    run_dir.join("cgroup")
}

/// Whether a run directory is that of a host pod.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "run directories are in memory (tmpfs)")]
pub fn owns(run_dir: &Path) -> bool {
    cgroup_link(run_dir).is_symlink()
}

/// Connects to the supervisor of a pod.
async fn connect(run_dir: &Path, timeout: Duration) -> Result<Agent, Error> {
    match Agent::connect(socket_path(run_dir), timeout).await {
        Ok(agent) => Ok(agent),
        Err(cause) => Err(Error::Supervisor { cause, log: last_lines(run_dir).await }),
    }
}

async fn last_lines(run_dir: &Path) -> String {
    let text = tokio::fs::read(log_path(run_dir)).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default().join("; ")
}

/// Takes over a pod that runs already, after a restart of huskd.
///
/// # Errors
/// The supervisor does not answer.
pub async fn reattach(
    run_dir: &Path,
    cgroup: &Path,
    timeout: Duration,
) -> Result<(Supervisor, Agent), Error> {
    let agent = connect(run_dir, timeout).await?;
    let supervisor = Supervisor { run_dir: run_dir.to_owned(), cgroup: cgroup.to_owned() };
    Ok((supervisor, agent))
}

/// Ends every process of a pod, and removes its run directory. Succeeds when
/// there is nothing.
///
/// # Errors
/// A process does not end, or the directory cannot be removed.
pub async fn destroy(run_dir: &Path, cgroup: Option<&Path>) -> Result<(), Error> {
    let link = cgroup_link(run_dir);
    let linked = tokio::fs::read_link(&link).await.ok();
    for group in cgroup.into_iter().chain(linked.as_deref()) {
        crash::point("processes of a host pod to be killed");
        cgroup::kill(group).map_err(file("kill the processes of", group))?;
        let deadline = Instant::now() + KILL_TIMEOUT;
        while cgroup::is_populated(group) {
            if Instant::now() >= deadline {
                return Err(Error::Alive(group.to_owned()));
            }
            sleep(Duration::from_millis(10)).await;
        }
        cgroup::remove(group).await.map_err(file("remove control group", group))?;
    }
    let run_dir = run_dir.to_owned();
    blocking(move || remove_folder(&run_dir)).await
}

/// Removes the run directory of a pod. The call blocks.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn remove_folder(run_dir: &Path) -> Result<(), Error> {
    crash::point("folder of a host pod to be unmounted");
    give_up_mount(run_dir).map_err(file("unmount", run_dir))?;
    remove_tree(run_dir).map_err(file("remove", run_dir))
}

/// Makes the directory a mount of its own, from which no mount propagates.
fn make_mount(run_dir: &Path) -> io::Result<()> {
    mount(Some(run_dir), run_dir, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    mount(None::<&str>, run_dir, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}

/// Undoes [`make_mount`], however often it was called.
fn give_up_mount(run_dir: &Path) -> io::Result<()> {
    loop {
        match umount2(run_dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_never_made_is_destroyed_without_a_word() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("never");
        assert!(!owns(&run_dir));
        destroy(&run_dir, None).await.unwrap();
        destroy(&run_dir, Some(&folder.path().join("no-group"))).await.unwrap();
    }

    #[tokio::test]
    async fn a_supervisor_whose_socket_was_removed_lives_while_it_has_a_process() {
        let folder = tempfile::tempdir().unwrap();
        let (run_dir, cgroup) = (folder.path().join("run"), folder.path().join("group"));
        let group = supervisor_group(&cgroup);
        std::fs::create_dir_all(&group).unwrap();
        std::fs::create_dir(&run_dir).unwrap();
        std::os::unix::fs::symlink(&cgroup, cgroup_link(&run_dir)).unwrap();
        let supervisor = Supervisor { run_dir: run_dir.clone(), cgroup };
        std::fs::write(group.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        assert!(lives(&run_dir).await);
        let soon = Duration::from_secs(2);
        assert!(tokio::time::timeout(soon, supervisor.wait()).await.is_err());
        std::fs::write(group.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
        assert!(!lives(&run_dir).await);
        tokio::time::timeout(soon * 5, supervisor.wait()).await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_the_log_is_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..20).map(|number| format!("line {number}\n\n")).collect();
        std::fs::write(log_path(folder.path()), text).unwrap();
        let quote = last_lines(folder.path()).await;
        assert!(quote.starts_with("line 12; ") && quote.ends_with("; line 19"), "{quote}");
        assert_eq!(quoted(&last_lines(Path::new("/nonexistent")).await), "");
    }
}
