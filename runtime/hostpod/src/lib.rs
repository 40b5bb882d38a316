//! Pods of plain host containers: the only code that starts `husk-agent` on the
//! host.
//!
//! Such a pod has no machine. Its supervisor, one `husk-agent` process, has
//! entered the pod's namespaces and runs its containers with the host's runc.
//! It outlives huskd as a VMM does, and everything of the pod is in one control
//! group: to end the pod is to kill that.
//!
//! What the supervisor mounts is in its own mount namespace, below the pod's
//! run directory; that is a mount of its own, so that nothing mounted below it
//! appears on the host. Seen from here the directory holds plain files.

#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_agent_client::{self as agent, Agent};
use husk_base::{cgroup, remove_tree};
use husk_proto::agent::LIVENESS_PORT;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

pub mod launch;

/// Most time that processes take to go once they are killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// Most lines of a supervisor's log that an error quotes.
const LAST_LINES: usize = 8;

/// Something went wrong with the supervisor of a host pod.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of the pod.
    #[error("host pod: {stage}: {path}: {cause}")]
    File {
        /// What was being done.
        stage: &'static str,
        /// To which.
        path: PathBuf,
        /// Why it failed.
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
        /// What the connection said.
        cause: String,
        /// The last of the supervisor's log.
        log: String,
    },
    /// Processes that SIGKILL does not end.
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

/// The process that runs a host pod, as one can tell from outside whether it
/// lives.
#[derive(Clone, Debug)]
pub struct Supervisor {
    run_dir: PathBuf,
    cgroup: PathBuf,
}

impl Supervisor {
    /// Returns when it has ended, with the last that it said. Its containers
    /// cannot be waited for by anybody then, so they end as well.
    pub async fn wait(&self) -> String {
        let socket = socket_path(&self.run_dir);
        loop {
            match UnixStream::connect(&socket).await {
                Err(error) if is_gone(&error, &self.cgroup) => break,
                // Its backlog may be full: that is no end.
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
            tracing::warn!(cgroup = %self.cgroup.display(), %error, "end what a supervisor left behind");
        }
        format!("the pod's supervisor (husk-agent) ended{}", quoted(&last_lines(&self.run_dir)))
    }
}

/// Whether an error at a supervisor's socket says that it has gone. One whose socket
/// somebody has removed lives for as long as there is a process in its group.
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

/// Whether there is a supervisor that `run_dir` belongs to. One that is slow to
/// answer lives.
pub async fn lives(run_dir: &Path) -> bool {
    let cgroup = std::fs::read_link(cgroup_link(run_dir)).unwrap_or_default();
    !UnixStream::connect(socket_path(run_dir)).await.is_err_and(|error| is_gone(&error, &cgroup))
}

fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

fn log_path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.log")
}

/// A link to the pod's control group, by which the pod can be ended even when
/// no record speaks of it.
fn cgroup_link(run_dir: &Path) -> PathBuf {
    run_dir.join("cgroup")
}

/// Whether a run directory is that of a host pod.
#[must_use]
pub fn owns(run_dir: &Path) -> bool {
    cgroup_link(run_dir).is_symlink()
}

fn last_lines(run_dir: &Path) -> String {
    let text = std::fs::read(log_path(run_dir)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default().join("; ")
}

/// Takes over a pod that runs already, after a restart of huskd.
///
/// # Errors
/// When its supervisor does not answer: the pod is then to be ended.
pub async fn reattach(
    run_dir: &Path,
    cgroup: &Path,
    timeout: Duration,
) -> Result<(Supervisor, Agent), Error> {
    let failed = |cause| Error::Supervisor { cause, log: last_lines(run_dir) };
    let agent = Agent::connect(socket_path(run_dir), timeout).await.map_err(failed)?;
    let supervisor = Supervisor { run_dir: run_dir.to_owned(), cgroup: cgroup.to_owned() };
    Ok((supervisor, agent))
}

/// Ends every process of a pod, and removes its run directory. Succeeds when
/// there is nothing.
///
/// # Errors
/// When a process does not go, or the directory cannot be removed.
pub async fn destroy(run_dir: &Path, cgroup: Option<&Path>) -> Result<(), Error> {
    let link = cgroup_link(run_dir);
    let linked = std::fs::read_link(&link).ok();
    for group in cgroup.into_iter().chain(linked.as_deref()) {
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
    give_up_mount(run_dir).map_err(file("unmount", run_dir))?;
    remove_tree(run_dir).map_err(file("remove", run_dir))
}

/// Makes the directory a mount of its own, from which no mount gets out.
fn make_mount(run_dir: &Path) -> io::Result<()> {
    mount(Some(run_dir), run_dir, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    mount(None::<&str>, run_dir, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}

/// Undoes that, however often it was done.
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

    #[test]
    fn the_end_of_the_log_is_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..20).map(|number| format!("line {number}\n\n")).collect();
        std::fs::write(log_path(folder.path()), text).unwrap();
        let quote = last_lines(folder.path());
        assert!(quote.starts_with("line 12; ") && quote.ends_with("; line 19"), "{quote}");
        assert_eq!(quoted(&last_lines(Path::new("/nonexistent"))), "");
    }
}
