//! The directory that a pod's file server serves, and the mounts in it.
//!
//! A volume is a mount of its own, which is made outside of the tree, given its attributes,
//! and only then put in its place. So a read-only volume is not writable for a moment. The mount
//! receives mounts from the host or not, as asked, and passes none back. The place is in the
//! file server's mount namespace alone: on the host there is an empty file or
//! directory of that name, nothing of the volume is busy there, and nothing can
//! be left when the server has ended.

use std::collections::HashSet;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use husk_base::crash;
use husk_base::id::SandboxId;
use husk_base::mountinfo;
use rustix::fs::{AtFlags, CWD, FileType, Mode as Permissions, OFlags, StatxFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::volume::{Error, Prepared, Volume};

/// The directory of all shared directories, below huskd's run directory. They are not beside a
/// VM's sockets, whose directory is removed with all files in it.
const FOLDER: &str = "volumes";

/// One pod's directory.
#[derive(Debug)]
pub struct SharedDir {
    path: PathBuf,
}

impl SharedDir {
    /// The directory of a sandbox.
    #[must_use]
    pub fn of(run_dir: &Path, id: &SandboxId) -> Self {
        Self { path: run_dir.join(FOLDER).join(id.short()) }
    }

    /// The directories of all sandboxes that have one, by name.
    pub fn all(run_dir: &Path) -> impl Iterator<Item = Self> {
        let entries = std::fs::read_dir(run_dir.join(FOLDER)).into_iter().flatten().flatten();
        entries.map(|entry| Self { path: entry.path() })
    }

    /// The directory's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory, if it is not there yet.
    ///
    /// # Errors
    /// The step that failed.
    pub fn open(&self) -> Result<(), Error> {
        std::fs::create_dir_all(&self.path).map_err(self.failed("make directory", &self.path))
    }

    /// Mounts the volumes that are not in use yet, under their names, in the file server's
    /// namespace.
    ///
    /// # Errors
    /// The step that failed.
    pub fn bind(
        &self,
        namespace: BorrowedFd<'_>,
        volumes: &[Prepared],
        in_use: &[Volume],
    ) -> Result<(), Error> {
        let mut names: HashSet<&str> = in_use.iter().map(|volume| volume.name.as_str()).collect();
        for prepared in volumes {
            if !prepared.volume.synced && names.insert(&prepared.volume.name) {
                // No container uses a mount that has the name already.
                self.release(Some(namespace), &prepared.volume.name)?;
                self.bind_one(namespace, prepared)?;
            }
        }
        Ok(())
    }

    fn bind_one(&self, namespace: BorrowedFd<'_>, prepared: &Prepared) -> Result<(), Error> {
        let Volume { name, source, mode, .. } = &prepared.volume;
        let point = self.path.join(name);
        let failed = |stage| self.failed(stage, &source.path);
        let stat = rustix::fs::fstat(prepared.file()).map_err(|errno| failed("look at")(errno.into()))?;
        let made = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            std::fs::create_dir(&point)
        } else {
            std::fs::File::create_new(&point).map(drop)
        };
        made.map_err(self.failed("make mount point", &point))?;
        crash::point("mount point of a volume made");
        let tree = clone_tree(prepared.file()).map_err(failed("copy the mount of"))?;
        let all = Attributes {
            set: libc::MOUNT_ATTR_NOSUID
                | libc::MOUNT_ATTR_NODEV
                | if mode.recursive { libc::MOUNT_ATTR_RDONLY } else { 0 },
            propagation: if mode.follow { libc::MS_SLAVE } else { libc::MS_PRIVATE },
        };
        all.set(tree.as_fd(), true).map_err(failed("set up the mount of"))?;
        if mode.read_only {
            let own = Attributes { set: libc::MOUNT_ATTR_RDONLY, propagation: 0 };
            own.set(tree.as_fd(), false).map_err(failed("set up the mount of"))?;
        }
        inside(namespace, || put(&tree, &place(name))).map_err(failed("mount"))?;
        crash::point("volume mounted");
        Ok(())
    }

    /// Unmounts a volume and removes its mount point. Without a namespace there is no mount.
    /// Succeeds when there is nothing.
    ///
    /// # Errors
    /// The step that failed.
    pub fn release(&self, namespace: Option<BorrowedFd<'_>>, name: &str) -> Result<(), Error> {
        let point = self.path.join(name);
        crash::point("volume to be unmounted");
        if let Some(namespace) = namespace {
            inside(namespace, || unmount(&place(name))).map_err(self.failed("unmount", &point))?;
        }
        // The mount point that `bind` made is an empty file or
        // directory, and only such a one is removed.
        let removed = match std::fs::symlink_metadata(&point) {
            Ok(metadata) if metadata.is_dir() => std::fs::remove_dir(&point),
            Ok(metadata) if metadata.len() == 0 => std::fs::remove_file(&point),
            Ok(_) => Err(io::Error::other("it is not empty, so it is no mount point")),
            Err(cause) => Err(cause),
        };
        match removed {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                Err(self.failed("remove mount point", &point)(cause))
            }
            _ => Ok(()),
        }
    }

    /// Removes the directory of a pod whose file server has ended. Succeeds when
    /// there is none.
    ///
    /// # Errors
    /// The step that failed.
    pub fn close(&self) -> Result<(), Error> {
        let entries = match std::fs::read_dir(&self.path) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(self.failed("read", &self.path))?,
        };
        for entry in entries.flatten() {
            self.release(None, &entry.file_name().to_string_lossy())?;
        }
        std::fs::remove_dir(&self.path).map_err(self.failed("remove directory", &self.path))?;
        // The directory of all is removed with the last one.
        if let Some(folder) = self.path.parent() {
            let _ = std::fs::remove_dir(folder);
        }
        Ok(())
    }

    fn failed(&self, stage: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = path.to_owned();
        move |cause| Error::File { stage, path, cause }
    }
}

/// Opens a descriptor that names a file, and cannot read or write it.
pub(crate) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Permissions::empty())?)
}

/// The id of the mount through which a file was opened.
pub(crate) fn mount_id(file: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// A copy of the mount that a file is in, and of the mounts below the file, with the file as
/// the root. The copy is in no tree yet.
fn clone_tree(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(rustix::mount::open_tree(file, c"", flags)?)
}

/// The path of a volume for its file server, whose root is the shared directory.
fn place(name: &str) -> PathBuf {
    Path::new("/").join(name)
}

/// Runs `work` in another mount namespace, on a thread that ends with it.
fn inside(namespace: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    let enter = move || {
        // A thread shares the root of the process until it unshares it.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNS)?;
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("volumes".into()).spawn_scoped(scope, enter)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that mounts panicked")))
    })
}

fn put(tree: &OwnedFd, path: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, c"", CWD, path, flags)?)
}

fn unmount(path: &Path) -> io::Result<()> {
    use rustix::io::Errno;
    loop {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Another mount may be below this one.
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The attributes that mount_setattr(2) changes (`struct mount_attr`).
#[derive(Clone, Copy, Default)]
struct Attributes {
    set: u64,
    propagation: u64,
}

impl Attributes {
    fn set(self, tree: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
        let attributes =
            libc::mount_attr { attr_set: self.set, attr_clr: 0, propagation: self.propagation, userns_fd: 0 };
        let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
        let empty: &CStr = c"";
        // SAFETY: the path ends with a NUL, and the struct is as long as is said.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.as_raw_fd(),
                empty.as_ptr(),
                flags,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// The mount points of this namespace.
fn mount_points() -> Result<Vec<PathBuf>, Error> {
    const MOUNTS: &str = "/proc/self/mountinfo";
    let text =
        std::fs::read(MOUNTS).map_err(|cause| Error::File { stage: "read", path: MOUNTS.into(), cause })?;
    let lines = text.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4)).map(mountinfo::unescape).collect())
}

/// Whether something is mounted below `path`.
pub(crate) fn has_mounts_below(path: &Path) -> Result<bool, Error> {
    Ok(mount_points()?.iter().any(|point| point != path && point.starts_with(path)))
}

#[cfg(test)]
impl SharedDir {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }
}
