//! mount(2) and umount(2) with errors that name the mount.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use tokio::time::{Instant, sleep};

/// How long a busy filesystem may take to become idle: a container's mount
/// namespace goes a moment after its last process is reaped.
const IDLE: Duration = Duration::from_secs(2);

/// A mount could not be made or undone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// mount(2) failed.
    #[error("mount {filesystem} {from} on {to}: {cause}")]
    Mount { filesystem: String, from: String, to: PathBuf, cause: Errno },
    /// umount(2) failed.
    #[error("unmount {path}: {cause}")]
    Unmount { path: PathBuf, cause: Errno },
    /// The mount point could not be made.
    #[error("make mount point {path}: {cause}")]
    MountPoint { path: PathBuf, cause: io::Error },
}

impl Error {
    /// Whether the filesystem is in use, or mounted there already.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Mount { cause: Errno::EBUSY, .. } | Self::Unmount { cause: Errno::EBUSY, .. })
    }
}

/// Mounts `from` on the existing directory `to`.
pub fn mount(
    from: &str,
    to: impl AsRef<Path>,
    filesystem: &str,
    flags: MsFlags,
    options: &str,
) -> Result<(), Error> {
    let to = to.as_ref();
    nix::mount::mount(Some(from), to, Some(filesystem), flags, Some(options)).map_err(|cause| Error::Mount {
        filesystem: filesystem.to_owned(),
        from: from.to_owned(),
        to: to.to_owned(),
        cause,
    })
}

/// Makes `path` and the directories above it.
pub fn make_mount_point(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path).map_err(|cause| Error::MountPoint { path: path.to_owned(), cause })
}

/// Repeats `attempt` for a moment while it fails because a filesystem is busy.
pub async fn when_idle(attempt: impl Fn() -> Result<(), Error>) -> Result<(), Error> {
    let deadline = Instant::now() + IDLE;
    let mut pause = Duration::from_millis(1);
    loop {
        match attempt() {
            Err(error) if error.is_busy() && Instant::now() < deadline => {
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(100));
            }
            other => return other,
        }
    }
}

/// Unmounts `path` if something is mounted there.
pub fn unmount(path: &Path) -> Result<(), Error> {
    match nix::mount::umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(cause) => Err(Error::Unmount { path: path.to_owned(), cause }),
    }
}

/// Takes `path` out of the tree now; the filesystem is unmounted when it is
/// idle. This is for clean-up whose failure nobody handles.
pub fn detach(path: &Path) {
    let flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH;
    if let Err(cause) = nix::mount::umount2(path, flags)
        && !matches!(cause, Errno::EINVAL | Errno::ENOENT)
    {
        tracing::warn!(path = %path.display(), error = %cause, "failed to unmount");
    }
}
