//! Prepares a supervisor of host containers: it reads its arguments and enters the
//! pod's namespaces. A container that has no namespace of its own of some type then
//! shares the pod's, just as it shares the machine's in a VM pod.
//!
//! The supervisor has a mount namespace of its own. Everything that it mounts for its
//! containers (images, root filesystems, shared memory) goes with the pod's last
//! process, however that ends, and so do the loop devices below. Mounts of the host
//! still propagate to the containers, and theirs to the host where that is allowed:
//! only the pod's directory is private.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::guest::mode::Host;

/// The argument that makes this program a supervisor.
pub const HOST: &str = "--host";

/// The descriptor on which huskd passes the socket that the supervisor listens
/// on.
const SOCKET_FD: RawFd = 3;

/// The pod cannot do without its supervisor, so the kernel should kill it last.
/// No container inherits this: each has a value of its own.
const OOM_SCORE_ADJ: &str = "-999";

/// The supervisor cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arguments are wrong.
    #[error("{0}")]
    Arguments(String),
    /// A system call failed.
    #[error("{doing} {path}: {cause}")]
    Kernel { doing: &'static str, path: PathBuf, cause: io::Error },
}

fn kernel<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
    let path = path.to_owned();
    move |cause| Error::Kernel { doing, path, cause: cause.into() }
}

/// Parses the arguments behind [`HOST`].
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Host, Error> {
    let mut host = Host::default();
    let mut arguments = arguments.into_iter();
    while let Some(name) = arguments.next() {
        let name = name.to_string_lossy().into_owned();
        if name == "--own-ipc" {
            host.own_ipc = true;
            continue;
        }
        let value = arguments.next().map(PathBuf::from);
        let value = value.ok_or_else(|| Error::Arguments(format!("{name} needs a value")))?;
        match name.as_str() {
            "--directory" => host.directory = value,
            "--layers" => host.layers = value,
            "--runc" => host.runc = value,
            "--cgroup" => host.cgroup = value,
            "--netns" => host.netns = Some(value),
            _ => return Err(Error::Arguments(format!("unknown argument {name}"))),
        }
    }
    for (name, value) in
        [("--directory", &host.directory), ("--layers", &host.layers), ("--cgroup", &host.cgroup)]
    {
        if !value.is_absolute() {
            return Err(Error::Arguments(format!("{name} must be an absolute path")));
        }
    }
    if host.runc.as_os_str().is_empty() {
        return Err(Error::Arguments("--runc is missing".into()));
    }
    Ok(host)
}

/// Enters the pod's namespaces. Must be called before another thread runs.
pub fn enter(host: &Host) -> Result<(), Error> {
    let mut own = CloneFlags::CLONE_NEWNS;
    if let Some(netns) = &host.netns {
        let file = File::open(netns).map_err(kernel("open network namespace", netns))?;
        setns(file, CloneFlags::CLONE_NEWNET).map_err(kernel("enter network namespace", netns))?;
        // A pod in the host's network also has the host's name.
        own |= CloneFlags::CLONE_NEWUTS;
    }
    if host.own_ipc {
        own |= CloneFlags::CLONE_NEWIPC;
    }
    unshare(own).map_err(kernel("make namespaces for", &host.directory))?;
    // This fails unless it is a mount point; nothing may be mounted there then.
    mount(None::<&str>, &host.directory, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(kernel("keep to itself what is mounted below", &host.directory))?;
    // Processes that runc leaves behind become children of this one.
    // SAFETY: this request has no memory effects.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) })
        .map_err(kernel("become the parent of orphans in", &host.directory))?;
    // This takes a capability that huskd may not have, so a failure is ignored.
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ);
    Ok(())
}

/// Registers the socket that huskd passed with the event loop. May be called
/// once, because the descriptor has one owner.
pub fn socket() -> io::Result<tokio::net::UnixListener> {
    // Closed on exec, so that no container inherits it; which also fails if
    // the descriptor is not there.
    // SAFETY: fcntl with F_SETFD touches no memory.
    Errno::result(unsafe { libc::fcntl(SOCKET_FD, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: huskd starts a supervisor with its listening socket there, and
    // nothing else in this program knows the number.
    let socket = unsafe { std::os::unix::net::UnixListener::from_raw_fd(SOCKET_FD) };
    socket.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &str) -> Result<Host, Error> {
        parse(words.split_whitespace().map(OsString::from))
    }

    const NEEDED: &str = "--directory /run/p --layers /var/l --cgroup /sys/fs/cgroup/p --runc runc";

    #[test]
    fn what_huskd_says_is_understood() {
        let host = parsed(&format!("{NEEDED} --netns /run/netns/p --own-ipc")).unwrap();
        assert_eq!(host.directory, Path::new("/run/p"));
        assert_eq!(host.netns.as_deref(), Some(Path::new("/run/netns/p")));
        assert!(host.own_ipc);
        let of_the_host = parsed(NEEDED).unwrap();
        assert!(of_the_host.netns.is_none() && !of_the_host.own_ipc);
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        for (words, named) in [
            ("--directory /run/p --cgroup /c --runc runc", "--layers"),
            ("--directory run/p --layers /l --cgroup /c --runc runc", "--directory"),
            ("--layers /l --directory /d --cgroup /c", "--runc"),
            ("--netns", "--netns"),
            ("--colour red", "--colour"),
        ] {
            let error = parsed(words).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
