//! The jail: before the first request, the process gives up everything that it
//! does not need.

use std::io;
use std::path::Path;

use anyhow::Context;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;

use crate::identity::{self, CAPABILITIES};

/// Most files that the process may have open, if the kernel allows as many.
const OPEN_FILES: u64 = 1 << 20;

/// Confines the process to `root`: a mount namespace of its own, with `root` as
/// its root directory, into which huskd moves the volumes. Leaves the process
/// in `/proc/self/fd`, with few capabilities and no way to get more. Returns
/// how many files it may have open. Must be called before there is another
/// thread.
///
/// # Errors
/// The error names the step that failed.
pub fn enter(root: &Path) -> anyhow::Result<usize> {
    end_when_asked();
    let open_files = raise_open_files();
    rustix::process::umask(Mode::empty());
    // SAFETY: there is one thread, and nothing of it relies on the namespace.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
        .context("make a mount namespace")?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave).context("take mounts from the host, and give none")?;

    // Only the process's own descriptors are mounted of /proc. The mount is one
    // of its own, so that nothing leads up from there.
    rustix::mount::mount_bind("/proc/self/fd", "/proc").context("bind /proc/self/fd")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let descriptors = rustix::fs::openat(CWD, "/proc", flags, Mode::empty()).context("open /proc/self/fd")?;

    rustix::mount::mount_bind(root, root).with_context(|| format!("bind {}", root.display()))?;
    rustix::process::chdir(root).with_context(|| format!("enter {}", root.display()))?;
    rustix::process::pivot_root(".", ".").context("change the root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context("leave the old root")?;
    // Mounts below the root have flags of their own.
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount_remount("/", flags, c"").context("make the root read-only")?;
    rustix::process::fchdir(&descriptors).context("enter /proc/self/fd")?;

    drop_capabilities().context("drop capabilities")?;
    Ok(open_files)
}

/// Lets SIGTERM end the process. The first process of a PID namespace has no
/// default action for it, and a host that shuts down ends its processes with it.
fn end_when_asked() {
    extern "C" fn end(_: libc::c_int) {
        // SAFETY: ends the process without running anything else of it.
        unsafe { libc::_exit(0) }
    }
    let end: extern "C" fn(libc::c_int) = end;
    // SAFETY: the handler does nothing that a signal could interrupt at a bad time.
    unsafe { libc::signal(libc::SIGTERM, end as libc::sighandler_t) };
}

fn raise_open_files() -> usize {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open");
    let most = most
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .map_or(OPEN_FILES, |most: u64| most.min(OPEN_FILES));
    let limit = Rlimit { current: Some(most), maximum: Some(most) };
    if rustix::process::setrlimit(Resource::Nofile, limit).is_err() {
        // Without the right to raise the hard limit, the soft limit can still be raised to it.
        let now = rustix::process::getrlimit(Resource::Nofile);
        let limit = Rlimit { current: now.maximum, maximum: now.maximum };
        let _ = rustix::process::setrlimit(Resource::Nofile, limit);
    }
    let now = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(OPEN_FILES);
    usize::try_from(now).unwrap_or(usize::MAX)
}

fn drop_capabilities() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    for number in 0..64 {
        let Some(capability) = CapabilitySet::from_bits(1 << number) else { continue };
        if !CAPABILITIES.contains(capability) {
            // SAFETY: prctl with PR_CAPBSET_DROP takes a number and no pointer.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
        }
    }
    Ok(identity::set_effective(CAPABILITIES)?)
}
