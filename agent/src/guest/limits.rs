//! Limits that the kernel has by the size of a machine's memory, or that the
//! operators of nodes raise. Programs expect those of a node, whatever memory
//! their pod has; what they really use is charged to their containers.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

/// Limits of the agent's process, which containers inherit unless their
/// configuration has others: soft and hard.
const PROCESS: &[(Resource, rlim_t, rlim_t)] = &[
    // A soft limit far higher makes old programs slow that close every
    // descriptor they might have.
    (Resource::RLIMIT_NOFILE, 65_536, 1_048_576),
    // As containerd's unit has them. The kernel's own are 935 processes and as
    // many signals in a machine of 256 MiB.
    (Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY),
    (Resource::RLIMIT_SIGPENDING, RLIM_INFINITY, RLIM_INFINITY),
    (Resource::RLIMIT_CORE, RLIM_INFINITY, RLIM_INFINITY),
];

/// Kernel parameters that are raised to these values, and never lowered
/// (Linux `Documentation/admin-guide/sysctl/`, `networking/ip-sysctl.rst`).
const KERNEL: &[(&str, &str)] = &[
    // As on any 64-bit machine with systemd: a pid is not used again soon,
    // which the reaper relies on.
    ("kernel/pid_max", "4194304"),
    // By memory: one thread for 128 KiB.
    ("kernel/threads-max", "131072"),
    ("user/max_cgroup_namespaces", "65536"),
    ("user/max_ipc_namespaces", "65536"),
    ("user/max_mnt_namespaces", "65536"),
    ("user/max_net_namespaces", "65536"),
    ("user/max_pid_namespaces", "65536"),
    ("user/max_time_namespaces", "65536"),
    ("user/max_user_namespaces", "65536"),
    ("user/max_uts_namespaces", "65536"),
    ("fs/file-max", "9223372036854775807"),
    ("fs/epoll/max_user_watches", "4194304"),
    ("fs/fanotify/max_user_marks", "1048576"),
    ("fs/inotify/max_user_watches", "1048576"),
    ("net/netfilter/nf_conntrack_max", "262144"),
    ("net/netfilter/nf_conntrack_expect_max", "1024"),
    ("net/ipv4/tcp_max_orphans", "65536"),
    ("net/ipv4/tcp_max_tw_buckets", "131072"),
    ("net/ipv4/tcp_max_syn_backlog", "4096"),
    ("net/ipv4/tcp_rmem", "4096 131072 6291456"),
    ("net/ipv4/tcp_wmem", "4096 16384 4194304"),
    // The same on every machine, and too little for a node.
    ("vm/max_map_count", "1048576"),
    ("fs/aio-max-nr", "1048576"),
    ("fs/fanotify/max_user_groups", "4096"),
    ("fs/inotify/max_user_instances", "8192"),
    ("kernel/keys/maxkeys", "10000"),
    ("kernel/keys/maxbytes", "1000000"),
    // As the kubelet sets them on its node.
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("vm/overcommit_memory", "1"),
];

/// Raises all of them. What fails is on the console: no pod fails for it.
pub fn raise() {
    for (resource, soft, hard) in PROCESS {
        if let Err(error) = raise_own(*resource, *soft, *hard) {
            tracing::warn!("raise {resource:?}: {error}");
        }
    }
    for (path, value) in KERNEL {
        let path = Path::new("/proc/sys").join(path);
        if let Err(error) = raise_to(&path, value) {
            tracing::warn!("write {value} to {}: {error}", path.display());
        }
    }
}

/// Raises a limit of this process, as far as it is lower.
fn raise_own(resource: Resource, soft: rlim_t, hard: rlim_t) -> nix::Result<()> {
    let (_, hard_before) = getrlimit(resource)?;
    let hard = hard.max(hard_before);
    setrlimit(resource, soft.min(hard), hard)
}

/// Writes a parameter whose value is lower. One that the kernel was built
/// without needs no raising.
fn raise_to(path: &Path, value: &str) -> io::Result<()> {
    let before = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        before => before?,
    };
    if is_less(&before, value) { fs::write(path, value) } else { Ok(()) }
}

/// Whether a parameter's last number, which is its largest, is less than
/// another's.
fn is_less(before: &str, value: &str) -> bool {
    let last = |text: &str| text.split_whitespace().last().and_then(|word| word.parse::<u64>().ok());
    last(before) < last(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_raised_and_never_lowered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parameter");
        for (before, value, after) in [
            ("1871\n", "131072", "131072"),
            ("192730\n", "131072", "192730\n"),
            ("131072\n", "131072", "131072\n"),
            ("4096\t131072\t2097152\n", "4096 131072 6291456", "4096 131072 6291456"),
            ("4096\t131072\t33554432\n", "4096 131072 6291456", "4096\t131072\t33554432\n"),
            ("9223372036854775807\n", "9223372036854775807", "9223372036854775807\n"),
        ] {
            fs::write(&path, before).unwrap();
            raise_to(&path, value).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), after);
        }
    }

    #[test]
    fn a_parameter_that_the_kernel_does_not_have_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        raise_to(&folder.path().join("none"), "1").unwrap();
        assert!(!folder.path().join("none").exists());
    }
}
