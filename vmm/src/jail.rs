//! The jail: before the first request, the process gives up the host's files,
//! its privileges, and the system calls that it does not need ([`filter`]).
//!
//! Everything that a machine is made of arrives as open descriptors, so the
//! process needs nothing of what it gives up. KVM is open by then.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid};

use crate::stage::{StageError, at};

pub mod filter;

/// Turns the process into one of `user`, who owns no files, in an empty and
/// read-only root directory, without any way to regain privileges. Must be
/// called before there is another thread.
///
/// # Errors
/// [`StageError`] with the step that failed.
pub fn enter(user: u32) -> Result<(), StageError> {
    const STAGE: &str = "leave the host's files";
    const NOTHING: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).map_err(at(STAGE))?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_SLAVE | MsFlags::MS_REC, NOTHING).map_err(at(STAGE))?;
    // Any directory that exists on every host would do.
    let place = "/proc";
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("husk"), place, Some("tmpfs"), flags, Some("mode=0,nr_inodes=1")).map_err(at(STAGE))?;
    chdir(place).map_err(at(STAGE))?;
    pivot_root(".", ".").map_err(at(STAGE))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(at(STAGE))?;

    // A process of user 0 loses all its capabilities, too.
    setgroups(&[]).map_err(at("leave all groups"))?;
    let group = Gid::from_raw(user);
    setresgid(group, group, group).map_err(at("change the group"))?;
    let user = Uid::from_raw(user);
    setresuid(user, user, user).map_err(at("change the user"))?;
    nix::sys::prctl::set_no_new_privs().map_err(at("forgo new privileges"))?;
    // Unprivileged processes cannot trace this one, and a crash leaves no core
    // file with the guest's memory.
    nix::sys::prctl::set_dumpable(false).map_err(at("forbid core dumps"))
}
