//! Kernel parameters of the pod.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::guest::mode::Host;

/// A parameter could not be set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is not the name of a parameter.
    #[error("sysctl {0:?} is not a parameter's name, such as net.ipv4.ip_forward")]
    Name(String),
    /// The parameter belongs to the whole host, or to a namespace that the pod
    /// shares with it.
    #[error("sysctl {0} would change the whole host, not the pod alone: run the pod in a virtual machine")]
    NotOfThePod(String),
    /// The kernel does not know the parameter, or refuses the value.
    #[error("sysctl {name} = {value:?}: {cause}")]
    Refused { name: String, value: String, cause: io::Error },
    /// The namespace of the parameter cannot be entered.
    #[error("enter the pod's IPC namespace {path}: {cause}")]
    Enter { path: PathBuf, cause: io::Error },
}

/// Kernel parameters of an IPC namespace, with those below `fs.mqueue`.
const IPC: &[&str] = &[
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Parameters that let every user of a pod bind low ports and send pings, as
/// containers expect. The pod's network belongs to its containers alone.
const OPEN_TO_USERS: &[(&str, &str)] =
    &[("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// Parameters that a pod with a network of its own has unless its client sets
/// others; none for a pod in the host's network.
pub fn open_to_users(host: Option<&Host>) -> &'static [(&'static str, &'static str)] {
    if host.is_none_or(|host| host.netns.is_some()) { OPEN_TO_USERS } else { &[] }
}

/// Checks that a pod may set a parameter. On the host, a pod may set only those
/// of its own namespaces.
pub fn check(name: &str, host: Option<&Host>) -> Result<(), Error> {
    let Some(host) = host else { return Ok(()) };
    let path = path(name).ok_or_else(|| Error::Name(name.to_owned()))?;
    let below = path.strip_prefix("/proc/sys").unwrap_or(&path);
    let own = (below.starts_with("net") && host.netns.is_some()) || (is_of_ipc(name) && host.own_ipc);
    if own { Ok(()) } else { Err(Error::NotOfThePod(name.to_owned())) }
}

/// Whether the parameter belongs to an IPC namespace.
pub fn is_of_ipc(name: &str) -> bool {
    let Some(path) = path(name) else { return false };
    let below = path.strip_prefix("/proc/sys").unwrap_or(&path);
    let dotted = below.to_string_lossy().replace('/', ".");
    below.starts_with("fs/mqueue") || IPC.contains(&dotted.as_str())
}

/// Sets one parameter.
pub fn set(name: &str, value: &str) -> Result<(), Error> {
    let path = path(name).ok_or_else(|| Error::Name(name.to_owned()))?;
    let written = fs::OpenOptions::new().write(true).open(path).and_then(|file| {
        // The kernel takes a value as a whole, in one write.
        io::Write::write_all(&mut &file, value.as_bytes())
    });
    written.map_err(|cause| Error::Refused { name: name.to_owned(), value: value.to_owned(), cause })
}

/// Sets parameters of an IPC namespace other than the agent's, which is pinned
/// at `namespace` and belongs to a user namespace with this `root`.
pub fn set_in(
    namespace: &Path,
    root: u32,
    sysctls: impl IntoIterator<Item = (String, String)> + Send,
) -> Result<(), Error> {
    // A thread has namespaces and a user of its own, which end with it.
    std::thread::scope(|scope| {
        let setter = scope.spawn(|| {
            enter(namespace).map_err(|cause| Error::Enter { path: namespace.to_owned(), cause })?;
            for (name, value) in sysctls {
                set_as_either_root(&name, &value, root)?;
            }
            Ok(())
        });
        setter.join().unwrap_or_else(|_| {
            Err(Error::Enter {
                path: namespace.to_owned(),
                cause: io::Error::other("its thread ended early"),
            })
        })
    })
}

fn enter(namespace: &Path) -> io::Result<()> {
    let file = fs::File::open(namespace)?;
    Ok(nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWIPC)?)
}

/// Sets a parameter as either root. Until Linux 6.8 only the machine's root may
/// write these parameters, and since 6.9 only the namespace's root
/// (`ipc_permissions` in `ipc/ipc_sysctl.c`).
fn set_as_either_root(name: &str, value: &str, root: u32) -> Result<(), Error> {
    match set(name, value) {
        Err(Error::Refused { cause, .. }) if cause.kind() == io::ErrorKind::PermissionDenied => {
            become_user(root).map_err(|cause| Error::Refused {
                name: name.to_owned(),
                value: value.to_owned(),
                cause,
            })?;
            let done = set(name, value);
            // Another user may have to write the next parameter.
            let _ = become_user(0);
            done
        }
        other => other,
    }
}

/// Changes the effective user of this thread only; the C library would change
/// the whole process's.
fn become_user(user: u32) -> io::Result<()> {
    let unchanged = u32::MAX;
    // SAFETY: setresuid(2) touches no memory.
    nix::errno::Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, unchanged, user, unchanged) })?;
    Ok(())
}

/// The file of a parameter. Its first separator decides which of the two
/// notations is used: `net.ipv4.conf.eth0/1.rp_filter` or
/// `net/ipv4/conf/eth0.1/rp_filter` (sysctl(8)).
fn path(name: &str) -> Option<PathBuf> {
    let dotted =
        name.find(['.', '/']).is_none_or(|at| name.get(at..).is_some_and(|rest| rest.starts_with('.')));
    let swap = |c| match c {
        '.' if dotted => '/',
        '/' if dotted => '.',
        other => other,
    };
    let relative: String = name.chars().map(swap).collect();
    let legal = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.:@".contains(&b))
    };
    relative.split('/').all(legal).then(|| Path::new("/proc/sys").join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_notations_lead_to_the_same_file() {
        let expected = Path::new("/proc/sys/net/ipv4/conf/eth0.1/rp_filter");
        assert_eq!(path("net.ipv4.conf.eth0/1.rp_filter").unwrap(), expected);
        assert_eq!(path("net/ipv4/conf/eth0.1/rp_filter").unwrap(), expected);
        assert_eq!(path("vm").unwrap(), Path::new("/proc/sys/vm"));
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "net..x", "../../etc/passwd", "net/../../x", "net.//.x", "a b", "/etc/x"]
        {
            assert!(path(name).is_none(), "{name}");
        }
    }

    #[test]
    fn on_the_host_a_pod_has_the_parameters_of_its_own_namespaces() {
        let own = Host { netns: Some("/run/netns/p".into()), own_ipc: true, ..Host::default() };
        let none = Host::default();
        for name in ["net.ipv4.ip_forward", "net/core/somaxconn", "kernel.shmmax", "fs.mqueue.msg_max"] {
            assert!(check(name, Some(&own)).is_ok(), "{name}");
            assert!(matches!(check(name, Some(&none)), Err(Error::NotOfThePod(_))), "{name}");
            assert!(check(name, None).is_ok(), "{name}");
        }
        for name in ["kernel.panic", "vm.swappiness", "fs.file-max", "kernel.core_pattern"] {
            assert!(matches!(check(name, Some(&own)), Err(Error::NotOfThePod(_))), "{name}");
        }
    }

    #[test]
    fn a_network_of_the_pods_own_is_open_to_its_users() {
        let own = Host { netns: Some("/run/netns/p".into()), ..Host::default() };
        for host in [None, Some(&own)] {
            for (name, _) in open_to_users(host) {
                assert!(check(name, host).is_ok(), "{name}");
            }
            assert_eq!(open_to_users(host).len(), 2);
        }
        assert!(open_to_users(Some(&Host::default())).is_empty(), "the host's own");
    }

    #[test]
    fn the_parameters_of_ipc_are_known_in_both_notations() {
        for name in ["kernel.shm_rmid_forced", "kernel/msgmax", "fs.mqueue.msg_max", "fs/mqueue/queues_max"] {
            assert!(is_of_ipc(name), "{name}");
        }
        for name in ["kernel.panic", "fs.file-max", "net.core.somaxconn", "fs.mqueuex", ""] {
            assert!(!is_of_ipc(name), "{name}");
        }
    }

    #[test]
    fn the_error_names_the_parameter() {
        let error = set("net.husk.no_such_parameter", "1").unwrap_err().to_string();
        assert!(error.contains("net.husk.no_such_parameter"), "{error}");
    }
}
