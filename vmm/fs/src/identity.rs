//! Acting as another user, for the files that one makes.
//!
//! A new file belongs to whoever makes it, and a set-group-ID directory passes
//! its group on; the kernel gets both right when the maker is the user that
//! the guest names. Access was checked by the guest, which knows the user's
//! other groups, so capabilities stay.

use husk_vmm_api::words::say;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use crate::Errno;

/// The process's powers beside those of every user: own, read, write and
/// change any file, as the users and groups that a guest names.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Sets what the calling thread may do, of [`CAPABILITIES`].
///
/// # Errors
/// The kernel's.
pub fn set_effective(effective: CapabilitySet) -> Result<(), Errno> {
    let sets = CapabilitySets { effective, permitted: CAPABILITIES, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets)
}

/// Runs `act` with `uid` and `gid` as the user and group of new files.
///
/// # Errors
/// The errors of `act`, and `EPERM` when the process may not do so.
pub fn as_user<T>(uid: u32, gid: u32, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    if (uid, gid) == (0, 0) {
        return act();
    }
    let _back = Back(|| set_fs_ids(0, 0).and_then(|()| set_effective(CAPABILITIES)));
    set_fs_ids(uid, gid)?;
    if uid != 0 {
        // The change took from what is effective all that has to do with files.
        set_effective(CAPABILITIES)?;
    }
    act()
}

/// Runs `act` such that writing to a file takes its set-ID bits away, as it
/// does for users who are not root (`FUSE_HANDLE_KILLPRIV_V2`).
///
/// # Errors
/// The errors of `act`.
pub fn killing_set_id<T>(kill: bool, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    if !kill {
        return act();
    }
    let _back = Back(|| set_effective(CAPABILITIES));
    set_effective(CAPABILITIES.difference(CapabilitySet::FSETID))?;
    act()
}

/// Takes a change of the thread back when it goes.
struct Back<F: Fn() -> Result<(), Errno>>(F);

impl<F: Fn() -> Result<(), Errno>> Drop for Back<F> {
    fn drop(&mut self) {
        // A thread that stays another user would make the next file as that
        // one: better to have no server than a wrong one.
        if (self.0)().is_err() {
            say(format_args!("husk-fs: cannot become root again"));
            std::process::abort();
        }
    }
}

fn set_fs_ids(uid: u32, gid: u32) -> Result<(), Errno> {
    // SAFETY: both take numbers and change the calling thread alone. They
    // answer what was before; asked for what is no id, they change nothing.
    let now = unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        (libc::setfsuid(u32::MAX), libc::setfsgid(u32::MAX))
    };
    if now == (uid.cast_signed(), gid.cast_signed()) { Ok(()) } else { Err(Errno::PERM) }
}
