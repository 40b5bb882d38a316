//! Control groups of pods as units of systemd.
//!
//! Where systemd manages the control groups of a host, it alone may make groups in its
//! tree, and it removes what it does not know. So a pod's group is a transient scope,
//! which systemd makes when it is asked over D-Bus
//! (<https://systemd.io/CONTROL_GROUP_INTERFACE/>). The scope is delegated: what is below
//! its group is the pod's business.
//!
//! A scope lives for as long as there is a process in it, so it begins with an idle one
//! ([`Scope`]), until the pod has its own.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_spawn::Idle;
use tokio::time::{Instant, sleep, timeout};

mod manager;
pub mod slice;

pub use manager::{Error, Manager};

/// Most time until a scope is there once systemd was asked for it.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// How often it is looked for meanwhile.
const LOOK: Duration = Duration::from_millis(2);

/// Whether systemd runs this host (sd_booted(3)).
#[must_use]
pub fn is_init() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// The names of the scope and its slice, if the control group at `path` is that of a scope.
#[must_use]
pub fn units(path: &Path) -> Option<(&str, &str)> {
    let scope = path.file_name()?.to_str().filter(|name| name.ends_with(".scope"))?;
    let slice = path.parent().and_then(Path::file_name).and_then(OsStr::to_str);
    Some((scope, slice.filter(|name| name.ends_with(slice::SUFFIX)).unwrap_or(slice::ROOT)))
}

/// A scope that was made, and the process that keeps it until the pod's processes are in it.
#[derive(Debug)]
pub struct Scope {
    _idle: Idle,
}

/// Makes the scope whose control group is to be `path`, and returns when the group is there.
///
/// # Errors
/// systemd cannot be reached, refuses, or makes another group than this.
pub async fn start(path: &Path, description: &str) -> Result<Scope, Error> {
    start_by(&Manager::connect().await?, path, description).await
}

/// Makes a scope as [`start`] does, by a connection that is there.
///
/// # Errors
/// The errors are those of [`start`].
pub async fn start_by(manager: &Manager, path: &Path, description: &str) -> Result<Scope, Error> {
    let (scope, slice) = units(path).ok_or_else(|| Error::NoScope(path.to_owned()))?;
    let idle = husk_spawn::idle().map_err(Error::Idle)?;
    manager.start_scope(scope, slice, idle.pid(), description).await?;
    let deadline = Instant::now() + START_TIMEOUT;
    while !has_process(path, idle.pid()) {
        if Instant::now() >= deadline {
            let group = group_of(idle.pid());
            manager.stop(scope).await?;
            return Err(Error::Elsewhere { scope: scope.to_owned(), path: path.to_owned(), group });
        }
        sleep(LOOK).await;
    }
    Ok(Scope { _idle: idle })
}

/// Ends the scope whose control group is `path`, with all processes that are left. One that
/// is not there is no error.
///
/// # Errors
/// systemd cannot be reached, or refuses.
pub async fn stop(path: &Path) -> Result<(), Error> {
    let Some((scope, _)) = units(path) else { return Ok(()) };
    Manager::connect().await?.stop(scope).await
}

fn has_process(path: &Path, pid: u32) -> bool {
    let processes = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    processes.lines().any(|line| line.parse() == Ok(pid))
}

/// The control group of a process, for people.
fn group_of(pid: u32) -> PathBuf {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("an unknown one").into()
}

/// The answer, or that there was none in time.
async fn within<T>(
    limit: Duration,
    what: &'static str,
    work: impl Future<Output = zbus::Result<T>>,
) -> Result<T, Error> {
    match timeout(limit, work).await {
        Ok(done) => done.map_err(|cause| Error::Bus { what, cause: Box::new(cause) }),
        Err(_) => Err(Error::Late { what, seconds: limit.as_secs() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_a_scope_by_its_name() {
        let root = Path::new("/sys/fs/cgroup");
        let slice = root.join("kubepods.slice/kubepods-pod1.slice");
        assert_eq!(units(&slice.join("husk-1.scope")), Some(("husk-1.scope", "kubepods-pod1.slice")));
        assert_eq!(units(&root.join("husk-1.scope")), Some(("husk-1.scope", "-.slice")));
        assert_eq!(units(&root.join("husk/husk-1")), None);
        assert_eq!(units(&slice), None);
    }
}
