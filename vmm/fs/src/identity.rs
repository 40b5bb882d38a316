//! Acting as another user when files are made.
//!
//! A new file belongs to the user that makes it, and a set-group-ID directory
//! passes its group on; the kernel gets both right when the maker is the user
//! that the guest names. The guest has checked access, and knows the user's
//! other groups, so the process keeps its capabilities.

use husk_vmm_api::words::say;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use crate::Errno;

/// The capabilities of the process: to own, read, write and change any file, as
/// the users and groups that a guest names.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Sets the effective capabilities of the calling thread, a subset of
/// [`CAPABILITIES`].
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
/// The errors of `act`, and `EPERM` when the process may not change its user.
pub fn as_user<T>(uid: u32, gid: u32, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    if (uid, gid) == (0, 0) {
        return act();
    }
    let _back = Back(|| set_fs_ids(0, 0).and_then(|()| set_effective(CAPABILITIES)));
    set_fs_ids(uid, gid)?;
    if uid != 0 {
        // The change of user has cleared the effective capabilities that
        // concern files.
        set_effective(CAPABILITIES)?;
    }
    act()
}

/// Runs `act` such that writing to a file clears its set-ID bits, as it does
/// for users who are not root (`FUSE_HANDLE_KILLPRIV_V2`).
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

/// Undoes a change of the thread when it is dropped.
struct Back<F: Fn() -> Result<(), Errno>>(F);

impl<F: Fn() -> Result<(), Errno>> Drop for Back<F> {
    fn drop(&mut self) {
        // A thread that stays another user would make the next file as that
        // user: no server is better than a wrong one.
        if (self.0)().is_err() {
            say(format_args!("husk-fs: failed to become root again"));
            std::process::abort();
        }
    }
}

fn set_fs_ids(uid: u32, gid: u32) -> Result<(), Errno> {
    // SAFETY: both calls take numbers and change the calling thread alone. They
    // return the previous id; called with an invalid id, they change nothing.
    let now = unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        (libc::setfsuid(u32::MAX), libc::setfsgid(u32::MAX))
    };
    if now == (uid.cast_signed(), gid.cast_signed()) { Ok(()) } else { Err(Errno::PERM) }
}
