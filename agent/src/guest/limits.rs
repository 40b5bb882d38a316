//! Limits that the kernel derives from the size of a machine's memory, or that
//! operators raise on nodes. Programs expect the limits of a node, however
//! little memory their pod has; the memory that they really use is charged to
//! their containers.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

/// Limits of the agent's process, soft and hard, which containers inherit
/// unless their configuration sets others.
const PROCESS: &[(Resource, rlim_t, rlim_t)] = &[
    // A far higher soft limit slows down old programs that close every
    // descriptor they might have.
    (Resource::RLIMIT_NOFILE, 65_536, 1_048_576),
    // These are as in containerd's unit. The kernel's own limits are 935
    // processes and as many signals in a machine of 256 MiB.
    (Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY),
    (Resource::RLIMIT_SIGPENDING, RLIM_INFINITY, RLIM_INFINITY),
    (Resource::RLIMIT_CORE, RLIM_INFINITY, RLIM_INFINITY),
];

/// Kernel parameters that are raised to these values, and never lowered (Linux
/// `Documentation/admin-guide/sysctl/`, `networking/ip-sysctl.rst`).
const KERNEL: &[(&str, &str)] = &[
    // This is as on any 64-bit machine with systemd. A pid is not used again
    // soon, which the reaper relies on.
    ("kernel/pid_max", "4194304"),
    // The kernel's own value depends on memory: one thread for 128 KiB.
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
    // The kernel's own values are the same on every machine, and too low for a
    // node.
    ("vm/max_map_count", "1048576"),
    ("fs/aio-max-nr", "1048576"),
    ("fs/fanotify/max_user_groups", "4096"),
    ("fs/inotify/max_user_instances", "8192"),
    ("kernel/keys/maxkeys", "10000"),
    ("kernel/keys/maxbytes", "1000000"),
    // These are as the kubelet sets them on its node.
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("vm/overcommit_memory", "1"),
];

/// Raises all limits. Failures are logged on the console; no pod fails for
/// them.
pub fn raise() {
    for (resource, soft, hard) in PROCESS {
        if let Err(error) = raise_own(*resource, *soft, *hard) {
            tracing::warn!(?resource, %error, "failed to raise a limit");
        }
    }
    for (path, value) in KERNEL {
        let path = Path::new("/proc/sys").join(path);
        if let Err(error) = raise_to(&path, value) {
            tracing::warn!(path = %path.display(), value, %error, "failed to raise a kernel parameter");
        }
    }
}

/// Raises a limit of this process, if it is lower.
fn raise_own(resource: Resource, soft: rlim_t, hard: rlim_t) -> nix::Result<()> {
    let (_, hard_before) = getrlimit(resource)?;
    let hard = hard.max(hard_before);
    setrlimit(resource, soft.min(hard), hard)
}

/// Raises a parameter, if its value is lower. A parameter that the kernel was
/// built without is skipped.
fn raise_to(path: &Path, value: &str) -> io::Result<()> {
    let before = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        before => before?,
    };
    if is_less(&before, value) { fs::write(path, value) } else { Ok(()) }
}

/// Whether the last number of a parameter, which is its largest, is less than
/// that of another value.
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
