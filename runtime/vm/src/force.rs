//! Ends a VMM that does not listen to its control socket, whether or not the pod has
//! a control group that could be killed.
//!
//! The VMM is found by its user, which no other process has while the machine's folder
//! is there. A process that is stopped dies of SIGKILL at once. One that the freezer of
//! cgroup v1 holds dies when its group is thawed, before it runs another instruction;
//! the freezer of cgroup v2 lets it die without that.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_base::{blocking, mountinfo};
use husk_spawn::pidfd;
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use crate::{Error, process, users};

/// Most time that the kernel takes to end a process.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// A VMM that was found.
#[derive(Debug)]
struct Found {
    pid: u32,
    pidfd: OwnedFd,
}

/// Whether the VMM of the machine in `run_dir` is there.
pub async fn is_there(run_dir: &Path) -> bool {
    let run_dir = run_dir.to_owned();
    blocking(move || find(&run_dir).is_ok_and(|found| !found.is_empty())).await
}

/// Kills the VMM of the machine in `run_dir`, and returns when it has ended. Answers
/// whether there was one.
///
/// # Errors
/// The VMM does not end, or cannot be looked for.
pub async fn kill(run_dir: &Path) -> Result<bool, Error> {
    let problem = |cause: String| Error::Control { stage: "kill", cause };
    let owned = run_dir.to_owned();
    let found = blocking(move || find(&owned)).await;
    let found = found.map_err(|error| problem(format!("find the VMM in /proc: {error}")))?;
    for vmm in &found {
        send_sigkill(&vmm.pidfd).map_err(|error| problem(format!("process {}: {error}", vmm.pid)))?;
        let pid = vmm.pid;
        blocking(move || thaw(pid)).await;
        let process =
            process::Process::watch(vmm.pidfd.try_clone().map_err(|error| problem(error.to_string()))?);
        let process = process.map_err(|error| problem(error.to_string()))?;
        if tokio::time::timeout(KILL_TIMEOUT, process.ended()).await.is_err() {
            let groups =
                tokio::fs::read_to_string(format!("/proc/{}/cgroup", vmm.pid)).await.unwrap_or_default();
            return Err(problem(format!(
                "process {} does not end within {} s of SIGKILL: thaw its control groups, and those above \
                 them ({})",
                vmm.pid,
                KILL_TIMEOUT.as_secs(),
                groups.trim().replace('\n', ", ")
            )));
        }
    }
    Ok(!found.is_empty())
}

/// Thaws a process that is frozen by a group of cgroup v1: there SIGKILL waits for that.
fn thaw(pid: u32) {
    if let Some(freezer) = freezer_of(pid)
        && let Err(error) = fs::write(freezer.join("freezer.state"), "THAWED")
    {
        tracing::warn!(pid, cgroup = %freezer.display(), %error, "failed to thaw the VMM");
    }
}

/// Processes that run as the user of the machine in `run_dir`: its VMM.
fn find(run_dir: &Path) -> io::Result<Vec<Found>> {
    let Some(user) = users::of(run_dir) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if user_of(pid) != Some(user) {
            continue;
        }
        let Ok(pidfd) = pidfd(pid) else { continue };
        // The number may have become another's before it was opened.
        if user_of(pid) == Some(user) {
            found.push(Found { pid, pidfd });
        }
    }
    Ok(found)
}

/// The real user of a process. The owner of its files in `/proc` is another, because a
/// VMM is not dumpable (proc(5)).
fn user_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    users.split_whitespace().next()?.parse().ok()
}

fn send_sigkill(process: &OwnedFd) -> io::Result<()> {
    match pidfd_send_signal(process, Signal::KILL) {
        // The process has ended meanwhile.
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The group of a process in the freezer hierarchy of cgroup v1; `None` where there is
/// none, or where the process is in its root, which cannot be frozen.
fn freezer_of(pid: u32) -> Option<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = groups.lines().find_map(|line| {
        let (_, line) = line.split_once(':')?;
        let (controllers, path) = line.split_once(':')?;
        controllers.split(',').any(|controller| controller == "freezer").then_some(path)
    })?;
    let path = path.strip_prefix('/').filter(|path| !path.is_empty())?;
    let mounts = fs::read("/proc/self/mountinfo").ok()?;
    Some(mounted_freezer(&mounts)?.join(path))
}

/// Where the root of the freezer hierarchy is mounted, as mountinfo tells it.
fn mounted_freezer(mounts: &[u8]) -> Option<PathBuf> {
    mounts.split(|byte| *byte == b'\n').find_map(|line| {
        let fields: Vec<_> = line.split(|byte| *byte == b' ').collect();
        let end = fields.iter().position(|field| field == b"-")?;
        let options = fields.get(end + 3)?;
        let is_freezer = *fields.get(end + 1)? == b"cgroup"
            && *fields.get(3)? == b"/"
            && options.split(|byte| *byte == b',').any(|option| option == b"freezer");
        is_freezer.then(|| mountinfo::unescape(fields.get(4).copied().unwrap_or_default()))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};

    use super::*;

    /// A process of the machine's user in the place of its VMM. Ends with the test.
    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn vmm(run_dir: &Path) -> Running {
        fs::create_dir_all(run_dir).unwrap();
        let user = users::claim(run_dir).unwrap();
        Running(Command::new("/bin/sleep").arg("600").uid(user).gid(user).spawn().unwrap())
    }

    async fn ends(mut vmm: Running) {
        for _ in 0..1000 {
            if vmm.0.try_wait().unwrap().is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it lives");
    }

    #[tokio::test]
    async fn a_vmm_that_is_stopped_is_ended_and_no_other() {
        let base = tempfile::tempdir().unwrap();
        let [stopped, other] = ["a", "b"].map(|name| base.path().join("sandboxes").join(name));
        let (vmm_of_stopped, mut vmm_of_other) = (vmm(&stopped), vmm(&other));
        let pid = nix::unistd::Pid::from_raw(vmm_of_stopped.0.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        assert!(is_there(&stopped).await);
        // The VMM listens, and takes no request.
        let _socket = crate::control::tests::listener(&crate::control_path(&stopped));
        crate::destroy_within(&stopped, Duration::from_secs(1)).await.unwrap();
        ends(vmm_of_stopped).await;
        assert!(vmm_of_other.0.try_wait().unwrap().is_none());
        assert!(!stopped.exists() && !is_there(&stopped).await);
    }

    #[tokio::test]
    async fn a_vmm_that_the_freezer_of_cgroup_v1_holds_is_thawed_into_its_end() {
        let mounts = fs::read("/proc/self/mountinfo").unwrap();
        let Some(freezer) = mounted_freezer(&mounts) else { return };
        let base = tempfile::tempdir().unwrap();
        let run_dir = base.path().join("sandboxes").join("a");
        let vmm = vmm(&run_dir);
        let group = freezer.join(format!("husk-test-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        fs::write(group.join("cgroup.procs"), vmm.0.id().to_string()).unwrap();
        fs::write(group.join("freezer.state"), "FROZEN").unwrap();
        assert_eq!(freezer_of(vmm.0.id()), Some(group.clone()));
        let killed = tokio::time::timeout(Duration::from_secs(10), kill(&run_dir)).await;
        let _ = fs::write(group.join("freezer.state"), "THAWED");
        ends(vmm).await;
        fs::remove_dir(&group).unwrap();
        assert!(killed.unwrap().unwrap());
    }

    #[tokio::test]
    async fn a_machine_without_a_user_has_no_vmm_to_be_found() {
        let base = tempfile::tempdir().unwrap();
        assert!(!is_there(base.path()).await);
        assert_eq!(mounted_freezer(b"1 2 0:3 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"), None);
        let two = b"31 24 0:27 /docker /a rw - cgroup cgroup rw,freezer\n32 24 0:27 / /b\\040c rw,nosuid shared:9 - cgroup cgroup rw,freezer\n";
        assert_eq!(mounted_freezer(two), Some(PathBuf::from("/b c")));
    }
}
