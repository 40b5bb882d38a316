//! The pod's user namespace, with the namespaces that must belong to it for a
//! container to mount their file systems, and ID-mapped mounts of images.
//!
//! A first process, which is also the pod's pid 1, makes user, pid and IPC
//! namespaces in one step; they are pinned as files, and containers join them.
//! Image files belong to ids of the machine; an ID-mapped mount
//! (mount_setattr(2)) shows them with the ids of the namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use husk_proto::agent::{IdMapping, UserNamespace, paths};
use nix::errno::Errno;

use crate::guest::mode::Mode;
use crate::pod::ns;
use crate::process::reaper::Reaper;

/// Constants of `linux/mount.h`.
const OPEN_TREE_CLONE: libc::c_ulong = 1;
const OPEN_TREE_CLOEXEC: libc::c_ulong = libc::O_CLOEXEC as libc::c_ulong;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_ulong = 4;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr` of `linux/mount.h`.
#[derive(Default)]
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Most ranges in one map of the kernel.
const MAX_RANGES: usize = 340;

/// Checks that the maps can be written.
pub fn check(wanted: &UserNamespace) -> Result<(), String> {
    for (what, map) in [("uids", &wanted.uids), ("gids", &wanted.gids)] {
        if map.is_empty() || map.len() > MAX_RANGES {
            return Err(format!("{what} has {} ranges, not 1 to {MAX_RANGES}", map.len()));
        }
        if root(map).is_none() {
            return Err(format!("{what} does not map id 0"));
        }
    }
    Ok(())
}

/// The machine's id for the namespace's id 0.
fn root(map: &[IdMapping]) -> Option<u32> {
    map.iter().find(|range| range.container_id == 0 && range.length > 0).map(|range| range.host_id)
}

/// The machine's user and group for root in the namespace.
pub fn owner(wanted: &UserNamespace) -> Option<(u32, u32)> {
    Some((root(&wanted.uids)?, root(&wanted.gids)?))
}

/// Makes the namespaces and pins them.
pub fn create(reaper: &Reaper, wanted: &UserNamespace, mode: &Mode) -> io::Result<()> {
    let pid = ns::start_pause(reaper, libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWIPC)?;
    for (file, map) in [("uid_map", &wanted.uids), ("gid_map", &wanted.gids)] {
        // The kernel takes a map as a whole, in one write.
        std::fs::write(format!("/proc/{pid}/{file}"), lines(map))?;
    }
    ns::pin(pid, "user", &mode.at(paths::USER_NAMESPACE))?;
    ns::pin(pid, "pid", &mode.at(paths::PID_NAMESPACE))?;
    ns::pin(pid, "ipc", &mode.at(paths::IPC_NAMESPACE))
}

/// The lines of a map (user_namespaces(7), "User and group ID mappings").
fn lines(map: &[IdMapping]) -> String {
    let line = |range: &IdMapping| format!("{} {} {}\n", range.container_id, range.host_id, range.length);
    map.iter().map(line).collect()
}

/// Mounts the tree at `from` on `to` with the ids of the user namespace pinned
/// at `namespace`.
pub fn mount_mapped(from: &Path, to: &Path, namespace: &Path) -> io::Result<()> {
    let tree = open_tree(from, 0)?;
    map(&tree, namespace)?;
    attach(&tree, to)
}

/// ID-maps a mount that is not attached anywhere to the user namespace pinned at `namespace`.
/// Mounts below it are not mapped: they have owners of their own, as with other runtimes.
pub fn map(tree: &OwnedFd, namespace: &Path) -> io::Result<()> {
    let namespace = File::open(namespace)?;
    let userns_fd = u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = MountAttr { attr_set: MOUNT_ATTR_IDMAP, userns_fd, ..MountAttr::default() };
    attributes.set(tree, 0)
}

/// Sets the propagation of mounts below a tree and of those in it (`MS_SLAVE`,
/// `MS_PRIVATE`).
pub fn propagate(tree: &OwnedFd, propagation: u64) -> io::Result<()> {
    MountAttr { propagation, ..MountAttr::default() }.set(tree, libc::AT_RECURSIVE)
}

impl MountAttr {
    fn set(&self, tree: &OwnedFd, flags: libc::c_int) -> io::Result<()> {
        // SAFETY: the kernel reads an empty string and `self`, whose size is
        // passed; both outlive the call.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | flags,
                &raw const *self,
                size_of::<Self>(),
            )
        })?;
        Ok(())
    }
}

/// Attaches a tree at its path.
pub fn attach(tree: &OwnedFd, to: &Path) -> io::Result<()> {
    let to = std::ffi::CString::new(to.as_os_str().as_bytes())?;
    // SAFETY: the kernel reads two strings, which outlive the call.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// A copy of the mount at `path`, not attached anywhere; with `AT_RECURSIVE`,
/// also of the mounts below it.
pub fn open_tree(path: &Path, flags: libc::c_int) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc::c_ulong::from(flags.unsigned_abs());
    // SAFETY: the kernel reads a string, which outlives the call.
    let fd =
        Errno::result(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just opened it for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(container_id: u32, host_id: u32, length: u32) -> IdMapping {
        IdMapping { container_id, host_id, length }
    }

    #[test]
    fn root_must_be_mapped() {
        let map = |range: IdMapping| UserNamespace { uids: vec![range], gids: vec![range] };
        assert_eq!(owner(&map(range(0, 1000, 65536))), Some((1000, 1000)));
        assert!(check(&map(range(0, 1000, 65536))).is_ok());
        assert!(check(&map(range(1, 1000, 65536))).is_err());
        assert!(check(&map(range(0, 1000, 0))).is_err());
        assert!(check(&UserNamespace::default()).is_err());
    }

    #[test]
    fn a_map_is_written_as_the_kernel_reads_it() {
        assert_eq!(lines(&[range(0, 1000, 5), range(5, 9, 1)]), "0 1000 5\n5 9 1\n");
    }
}
