//! The unpacker's jail: before it reads the first byte of a layer, the process gives up
//! everything that it does not need.
//!
//! It stays user 0, because layers hold files of any owner, but keeps only the six
//! capabilities that owners, modes, device nodes and file capabilities need. Its root is the
//! folder of the pull, on a mount on which device nodes cannot be opened: it can make them,
//! but not use them. It has no network, no `/proc`, and no system calls but those on files.

use std::io;
use std::path::Path;

use husk_seccomp::{BackendError, List, Refusal};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// The capabilities that the process keeps.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// The system calls on files that remain. None of them renames, executes or
/// connects.
const FILES: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_fcntl,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_fchownat,
    libc::SYS_fchmodat,
    libc::SYS_utimensat,
    libc::SYS_fsetxattr,
];

/// Most bytes of memory that the process may map: a decompressor's window, and the names of
/// folders.
const MEMORY: u64 = 2 << 30;
/// Most open files: a path has up to 256 folders.
const OPEN_FILES: u64 = 1024;

/// The step that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{0}")]
    Kernel(&'static str, #[source] io::Error),
    #[error("restrict system calls")]
    Filter(#[from] husk_seccomp::Error),
    #[error("restrict system calls")]
    List(#[from] BackendError),
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Kernel(step, error.into())
}

/// Locks the process into a folder, in which no file may grow beyond `largest` bytes.
/// Must be called before there is another thread.
///
/// # Errors
/// The step that failed; the process must end then.
pub(super) fn enter(workspace: &Path, largest: u64) -> Result<(), Error> {
    // Otherwise the process would be named "exe", after its program.
    let _ = rustix::thread::set_name(c"husk-unpack");
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(at("end with huskd"))?;
    for (resource, most) in [
        (Resource::Core, 0),
        (Resource::Nofile, OPEN_FILES),
        (Resource::As, MEMORY),
        (Resource::Fsize, largest),
    ] {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, limit).map_err(at("set limits"))?;
    }
    leave_the_host(workspace)?;
    drop_capabilities().map_err(at("drop capabilities"))?;
    List::new()?.calls(FILES).install(Refusal::Error)?;
    Ok(())
}

/// Makes the folder the root directory of the process.
fn leave_the_host(workspace: &Path) -> Result<(), Error> {
    const NOTHING: Option<&str> = None;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).map_err(at("leave the host's namespaces"))?;
    let step = "leave the host's files";
    mount(NOTHING, "/", NOTHING, MsFlags::MS_SLAVE | MsFlags::MS_REC, NOTHING).map_err(at(step))?;
    mount(Some(workspace), workspace, NOTHING, MsFlags::MS_BIND, NOTHING).map_err(at(step))?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(NOTHING, workspace, NOTHING, flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND, NOTHING)
        .map_err(at(step))?;
    nix::unistd::chdir(workspace).map_err(at(step))?;
    nix::unistd::pivot_root(".", ".").map_err(at(step))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(at(step))?;
    nix::unistd::chdir("/").map_err(at(step))
}

fn drop_capabilities() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    nix::sys::prctl::set_dumpable(false)?;
    for number in 0..64 {
        let Some(capability) = CapabilitySet::from_bits(1 << number) else { continue };
        if !CAPABILITIES.contains(capability) {
            // A kernel that does not know the capability says so.
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
    }
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: CAPABILITIES,
            permitted: CAPABILITIES,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}
