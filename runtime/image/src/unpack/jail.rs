//! The jails of the unpacker and of the packer: before the one reads the first byte of a
//! layer, and the other runs `mkfs.erofs`, the process gives up everything that it does not
//! need.
//!
//! The unpacker stays user 0, because layers hold files of any owner, but keeps only the six
//! capabilities that owners, modes, device nodes and file capabilities need. Its root is the
//! folder of the pull, on a mount on which device nodes cannot be opened: it can make them,
//! but not use them. It has no network, no `/proc`, and no system calls but those on files.
//!
//! The packer sees the same files. It can only read them, for which it keeps one capability.
//! Besides them it sees the file that it writes, a folder for temporary files, and, because
//! it runs a program of the host, the programs and libraries of the host.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use husk_seccomp::{BackendError, List, Refusal};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// The capabilities that the unpacker keeps.
const UNPACKER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// The capability that the packer keeps, to read files of any owner and mode.
const PACKER: CapabilitySet = CapabilitySet::DAC_READ_SEARCH;

/// The system calls on files that the unpacker keeps. None of them renames, executes or
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

/// The system calls on files that the packer keeps.
const PACKED_FILES: &[i64] = &[
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_flistxattr,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// Where a program of the host, and the libraries that it is linked with, can be.
const PROGRAMS: [&str; 8] =
    ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache"];

/// Most bytes of memory that the unpacker may map: a decompressor's window, and the names of
/// folders.
const MEMORY: u64 = 2 << 30;
/// Most bytes of memory that the packer may map: it remembers every file of an image.
const PACKER_MEMORY: u64 = 4 << 30;
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
    set_limits(MEMORY, largest)?;
    leave_the_hosts_namespaces()?;
    bind(workspace, workspace, MsFlags::MS_NOEXEC)?;
    make_root(workspace)?;
    drop_capabilities(UNPACKER).map_err(at("drop capabilities"))?;
    List::new()?.calls(FILES).install(Refusal::Error)?;
    Ok(())
}

/// The files of the workspace that the packer sees, each under its own name in `/`, and its
/// program.
pub(super) struct Shown<'a> {
    /// The folder that is packed.
    pub(super) input: &'a str,
    /// The file that is written.
    pub(super) output: &'a str,
    /// The folder of temporary files.
    pub(super) temporary: &'a str,
    /// The root of it all, an empty folder.
    pub(super) root: &'a str,
    /// The program, wherever it is.
    pub(super) program: &'a Path,
}

/// Locks the process into a root of which it can write one file, of at most `largest`
/// bytes, and temporary ones. Before there is any other thread.
///
/// # Errors
/// The step that failed; the process must end then.
pub(super) fn enter_to_pack(workspace: &Path, shown: &Shown<'_>, largest: u64) -> Result<(), Error> {
    set_limits(PACKER_MEMORY, largest)?;
    leave_the_hosts_namespaces()?;
    let root = &workspace.join(shown.root);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let step = "make a root";
    mount(Some("husk"), root, Some("tmpfs"), flags, Some("mode=755,size=1m")).map_err(at(step))?;
    for (name, flags) in [
        (shown.input, MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC),
        (shown.output, MsFlags::MS_NOEXEC),
        (shown.temporary, MsFlags::MS_NOEXEC),
    ] {
        show(root, &workspace.join(name), &Path::new("/").join(name), flags)?;
    }
    for place in PROGRAMS.map(Path::new).into_iter().chain([shown.program]) {
        show(root, place, place, MsFlags::MS_RDONLY)?;
    }
    mount(NOTHING, root, NOTHING, flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, NOTHING)
        .map_err(at(step))?;
    make_root(root)?;
    drop_capabilities(PACKER).map_err(at("drop capabilities"))?;
    // Whether its output is a terminal, and how wide (TCGETS, TIOCGWINSZ).
    let list = List::of_program()?.calls(PACKED_FILES).descriptor_flags()?.requests(b'T', &[0x01, 0x13])?;
    list.install(Refusal::Error)?;
    Ok(())
}

/// Shows `place` of the host as `name` below a root that is being made, unless it is not
/// there, or is part of what is shown already. A link is made again.
fn show(root: &Path, place: &Path, name: &Path, flags: MsFlags) -> Result<(), Error> {
    let step = "show files of the host";
    let point = root.join(name.strip_prefix("/").unwrap_or(name));
    let Ok(kind) = fs::symlink_metadata(place) else { return Ok(()) };
    if fs::symlink_metadata(&point).is_ok() {
        return Ok(());
    }
    fs::create_dir_all(point.parent().unwrap_or(root)).map_err(at(step))?;
    if kind.is_symlink() {
        return fs::read_link(place).and_then(|to| symlink(to, point)).map_err(at(step));
    }
    if kind.is_dir() { fs::create_dir(&point) } else { File::create(&point).map(drop) }.map_err(at(step))?;
    bind(place, &point, flags)
}

const NOTHING: Option<&str> = None;

/// Mounts `place` at `point`, with no use for its device nodes and set-ID programs.
fn bind(place: &Path, point: &Path, flags: MsFlags) -> Result<(), Error> {
    let step = "mount files of the host";
    mount(Some(place), point, NOTHING, MsFlags::MS_BIND, NOTHING).map_err(at(step))?;
    let flags = flags | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    mount(NOTHING, point, NOTHING, flags, NOTHING).map_err(at(step))
}

fn set_limits(memory: u64, largest: u64) -> Result<(), Error> {
    // Otherwise the process would be named "exe", after its program.
    let _ = rustix::thread::set_name(c"husk-unpack");
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(at("end with huskd"))?;
    for (resource, most) in [
        (Resource::Core, 0),
        (Resource::Nofile, OPEN_FILES),
        (Resource::As, memory),
        (Resource::Fsize, largest),
    ] {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, limit).map_err(at("set limits"))?;
    }
    Ok(())
}

fn leave_the_hosts_namespaces() -> Result<(), Error> {
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).map_err(at("leave the host's namespaces"))?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_SLAVE | MsFlags::MS_REC, NOTHING).map_err(at(LEAVE))
}

const LEAVE: &str = "leave the host's files";

/// Makes a folder on which there is a mount the root of all that the process sees.
fn make_root(folder: &Path) -> Result<(), Error> {
    nix::unistd::chdir(folder).map_err(at(LEAVE))?;
    nix::unistd::pivot_root(".", ".").map_err(at(LEAVE))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(at(LEAVE))?;
    nix::unistd::chdir("/").map_err(at(LEAVE))
}

/// Gives up all capabilities but these, also for programs that the process executes.
fn drop_capabilities(kept: CapabilitySet) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    nix::sys::prctl::set_dumpable(false)?;
    for number in 0..64 {
        let Some(capability) = CapabilitySet::from_bits(1 << number) else { continue };
        if !kept.contains(capability) {
            // A kernel that does not have it yet says so.
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
    }
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )?;
    Ok(())
}
