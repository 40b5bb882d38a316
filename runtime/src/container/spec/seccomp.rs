//! The seccomp profile `RuntimeDefault`: everything but what could change the
//! machine as a whole, reach into the kernel's rarely used parts, or escape a
//! container. A call is allowed again by the capability that governs it.

use husk_proto::cri::{self, security_profile::ProfileType};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use super::Error;

/// Calls that need a capability, by its name in CRI requests.
const GOVERNED: &[(&str, &[&str])] = &[
    (
        "SYS_ADMIN",
        &[
            "bpf",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "pivot_root",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "swapoff",
            "swapon",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    ("SYS_BOOT", &["kexec_file_load", "kexec_load", "reboot"]),
    ("SYS_MODULE", &["create_module", "delete_module", "finit_module", "init_module", "query_module"]),
    ("SYS_PACCT", &["acct"]),
    ("SYS_PTRACE", &["kcmp", "pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev"]),
    ("SYS_RAWIO", &["ioperm", "iopl"]),
    ("SYS_TIME", &["clock_adjtime", "clock_settime", "settimeofday", "stime"]),
    ("SYS_TTY_CONFIG", &["vhangup"]),
    ("SYS_NICE", &["mbind", "migrate_pages", "move_pages", "set_mempolicy", "set_mempolicy_home_node"]),
    ("SYSLOG", &["syslog"]),
];

/// Calls that no capability brings back.
const NEVER: &[&str] = &[
    "_sysctl",
    "add_key",
    "get_kernel_syms",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "keyctl",
    "nfsservctl",
    "open_by_handle_at",
    "request_key",
    "sysfs",
    "uselib",
    "userfaultfd",
    "ustat",
    "vm86",
    "vm86old",
];

/// `CLONE_NEW*` of `clone(2)`: time, mount, cgroup, uts, ipc, user, pid and net.
const CLONE_NEW: u64 =
    0x80 | 0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The profile that the client asked for; `None` for none.
pub(super) fn build(security: &cri::LinuxContainerSecurityContext) -> Result<Option<LinuxSeccomp>, Error> {
    let asked = security.seccomp.as_ref().map(|profile| profile.profile_type);
    if asked != Some(ProfileType::RuntimeDefault as i32) {
        return Ok(None);
    }
    let added =
        security.capabilities.as_ref().map(|change| change.add_capabilities.as_slice()).unwrap_or_default();
    let has = |capability: &str| {
        added.iter().any(|name| {
            let name = name.to_ascii_uppercase();
            name == "ALL" || name.strip_prefix("CAP_").unwrap_or(&name) == capability
        })
    };
    let mut rules = vec![refuse(NEVER, EPERM)?];
    for (_, calls) in GOVERNED.iter().filter(|(capability, _)| !has(capability)) {
        rules.push(refuse(calls, EPERM)?);
    }
    if !has("SYS_ADMIN") {
        // One rule a flag: an argument can be compared under one mask at a time.
        for bit in (0..64).map(|shift| 1u64 << shift).filter(|bit| CLONE_NEW & bit != 0) {
            let flag = LinuxSeccompArgBuilder::default()
                .index(0usize)
                .value(bit)
                .value_two(bit)
                .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
                .build()?;
            rules.push(
                LinuxSyscallBuilder::default()
                    .names(vec!["clone".to_owned()])
                    .action(LinuxSeccompAction::ScmpActErrno)
                    .errno_ret(EPERM)
                    .args(vec![flag])
                    .build()?,
            );
        }
        // Its flags are behind a pointer, out of a filter's sight; libraries
        // fall back to clone when it does not exist.
        rules.push(refuse(&["clone3"], ENOSYS)?);
    }
    let profile = LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActAllow)
        .architectures(vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32])
        .syscalls(rules)
        .build()?;
    Ok(Some(profile))
}

fn refuse(calls: &[&str], errno: u32) -> Result<LinuxSyscall, Error> {
    Ok(LinuxSyscallBuilder::default()
        .names(calls.iter().map(|call| (*call).to_owned()).collect::<Vec<_>>())
        .action(LinuxSeccompAction::ScmpActErrno)
        .errno_ret(errno)
        .build()?)
}
