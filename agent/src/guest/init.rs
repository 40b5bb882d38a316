//! Prepares a machine for its first container: the kernel's filesystems, a cgroup
//! tree with its controllers enabled, limits.

use std::fs;
use std::io;

use nix::mount::MsFlags;
use tracing_subscriber::filter::LevelFilter;

use crate::guest::mounts::{self, mount};
use crate::guest::{cgroup, limits};

/// The pod cannot do without the agent, so the kernel should kill it last.
const OOM_SCORE_ADJ: &str = "-999";

/// A machine could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A filesystem of the kernel could not be mounted.
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    /// The agent's own cgroup could not be made.
    #[error("set up cgroups: {0}")]
    Cgroups(#[source] io::Error),
}

/// Sends warnings to the console, whose tail the host keeps. Nothing below a
/// warning is logged, because each byte there is an exit to the VMM.
pub fn log_to_console() {
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::WARN)
        .with_writer(io::stderr)
        .without_time()
        .with_ansi(false)
        .init();
}

/// Uses one malloc arena for all threads, and returns free memory to the
/// kernel: the agent's memory counts as the pod's.
pub fn limit_malloc() {
    // SAFETY: mallopt only sets parameters of the allocator; no other thread
    // runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
    }
}

/// Mounts the kernel's filesystems, and sets up cgroups and limits.
pub fn prepare() -> Result<(), Error> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let tmp = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount("proc", "/proc", "proc", plain, "")?;
    mount("sysfs", "/sys", "sysfs", plain, "")?;
    // The kernel may have mounted it by itself (CONFIG_DEVTMPFS_MOUNT).
    match mount("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755") {
        Err(error) if error.is_busy() => {}
        other => other?,
    }
    mount("tmpfs", "/run", "tmpfs", tmp, "mode=0755")?;
    mount("tmpfs", "/tmp", "tmpfs", tmp, "mode=1777")?;
    mount("cgroup2", cgroup::ROOT, "cgroup2", plain, "")?;
    cgroup::delegate_controllers().map_err(Error::Cgroups)?;

    if let Err(error) = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        tracing::warn!(%error, "failed to set the agent's oom_score_adj");
    }
    limits::raise();
    Ok(())
}
