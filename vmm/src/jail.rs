//! What the process gives up before it serves its first request: the files of
//! the host, its privileges, and the system calls that it has no use for
//! ([`filter`]).
//!
//! All that a machine is made of comes as open descriptors, so that nothing of
//! this is missed. KVM is open by then.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid};

use crate::stage::{StageError, at};

pub mod filter;

/// Makes the process one of `user`, who owns nothing, in an empty and read-only
/// directory, without any way to more. Before there is any other thread.
///
/// # Errors
/// With what could not be done.
pub fn enter(user: u32) -> Result<(), StageError> {
    const STAGE: &str = "leave the host's files";
    const NOTHING: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).map_err(at(STAGE))?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_SLAVE | MsFlags::MS_REC, NOTHING).map_err(at(STAGE))?;
    // Any directory that every host has.
    let place = "/proc";
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("husk"), place, Some("tmpfs"), flags, Some("mode=0,nr_inodes=1")).map_err(at(STAGE))?;
    chdir(place).map_err(at(STAGE))?;
    pivot_root(".", ".").map_err(at(STAGE))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(at(STAGE))?;

    // With user 0 all capabilities go.
    setgroups(&[]).map_err(at("leave all groups"))?;
    let group = Gid::from_raw(user);
    setresgid(group, group, group).map_err(at("change the group"))?;
    let user = Uid::from_raw(user);
    setresuid(user, user, user).map_err(at("change the user"))?;
    nix::sys::prctl::set_no_new_privs().map_err(at("forgo new privileges"))?;
    // Nobody without privileges looks into it, and it leaves no core with the
    // guest's memory.
    nix::sys::prctl::set_dumpable(false).map_err(at("forbid core dumps"))
}
