//! The control group of a pod's VMM: what the pod costs the host, in one place.

use std::io;
use std::path::{Path, PathBuf};

use crate::id::SandboxId;

const ROOT: &str = "/sys/fs/cgroup";

/// Where a sandbox's control group goes: under the parent that the client
/// names, else under `/husk`. `None` where the host has no cgroup v2.
#[must_use]
pub fn path(parent: &str, id: &SandboxId) -> Option<PathBuf> {
    let root = Path::new(ROOT);
    if !root.join("cgroup.controllers").exists() {
        return None;
    }
    let parent = if parent.is_empty() { "husk" } else { parent };
    let below = Path::new(parent)
        .components()
        .filter_map(|part| match part {
            std::path::Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect::<PathBuf>();
    Some(root.join(below).join(format!("husk-{}", id.short())))
}

/// Makes it, and moves the process `pid` into it.
///
/// # Errors
/// The kernel's.
pub fn enter(path: &Path, pid: u32) -> io::Result<()> {
    std::fs::create_dir_all(path)?;
    std::fs::write(path.join("cgroup.procs"), pid.to_string())
}

/// Kills every process in it: the way to end a VMM that does not listen any
/// more, without a process id that may have become another's.
///
/// # Errors
/// The kernel's.
pub fn kill(path: &Path) -> io::Result<()> {
    std::fs::write(path.join("cgroup.kill"), "1")
}

/// Removes it once it is empty, which takes the kernel a moment after the last
/// process has gone. Succeeds when there is none.
///
/// # Errors
/// The kernel's, `EBUSY` when a process stays in it.
pub async fn remove(path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match std::fs::remove_dir(path) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) if tries >= 100 => return Err(error),
            Err(_) => {
                tries += 1;
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    }
    // The folder that all such groups share goes with the last of them; while
    // there are others this fails, as it should.
    if let Some(parent) = path.parent()
        && parent == Path::new(ROOT).join("husk")
    {
        let _ = std::fs::remove_dir(parent);
    }
    Ok(())
}
