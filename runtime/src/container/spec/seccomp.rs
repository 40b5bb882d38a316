//! Seccomp profiles: a file of the host's, or `RuntimeDefault`: everything but
//! what could change the machine as a whole, reach into the kernel's rarely
//! used parts, or escape a container. There, a call is allowed again by the
//! capability that governs it.

use std::path::Path;

use husk_proto::cri::{self, security_profile::ProfileType};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use super::Error;
use crate::text_file;

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

/// Largest profile that is read from a file, bytes.
const MAX_PROFILE: u64 = 1 << 20;

/// The profile that the client asked for; `None` for none.
pub(super) fn build(security: &cri::LinuxContainerSecurityContext) -> Result<Option<LinuxSeccomp>, Error> {
    match asked(security)? {
        Asked::Unconfined => Ok(None),
        Asked::File(path) => from_file(path).map(Some),
        Asked::Default => default_profile(security).map(Some),
    }
}

enum Asked<'a> {
    Unconfined,
    Default,
    File(&'a Path),
}

/// No profile at all is none; the old field's words are those of Kubernetes'
/// annotations.
fn asked(security: &cri::LinuxContainerSecurityContext) -> Result<Asked<'_>, Error> {
    #[allow(deprecated)]
    let old = security.seccomp_profile_path.as_str();
    let (kind, file) = match (&security.seccomp, old) {
        (Some(profile), _) => (profile.profile_type, profile.localhost_ref.as_str()),
        (None, "" | "unconfined") => return Ok(Asked::Unconfined),
        (None, "runtime/default" | "docker/default") => return Ok(Asked::Default),
        (None, file) => (ProfileType::Localhost as i32, file),
    };
    match ProfileType::try_from(kind) {
        Ok(ProfileType::RuntimeDefault) => Ok(Asked::Default),
        Ok(ProfileType::Unconfined) => Ok(Asked::Unconfined),
        Ok(ProfileType::Localhost) => {
            let path = Path::new(file.strip_prefix("localhost/").unwrap_or(file));
            if !path.is_absolute() {
                return Err(Error::Invalid(format!(
                    "seccomp profile `{file}` is not an absolute path of the host"
                )));
            }
            Ok(Asked::File(path))
        }
        Err(_) => Err(Error::Invalid(format!("unknown type {kind} of seccomp profile"))),
    }
}

/// A file in the form of the OCI runtime-spec, `linux.seccomp`.
fn from_file(path: &Path) -> Result<LinuxSeccomp, Error> {
    let wrong = |what: String| Error::Invalid(format!("seccomp profile {}: {what}", path.display()));
    let text = text_file::read(path, MAX_PROFILE).map_err(|error| wrong(error.to_string()))?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let rules = value.get("syscalls").and_then(serde_json::Value::as_array).into_iter().flatten();
    // Docker's own format makes rules depend on these; without them it would
    // mean something else.
    for rule in rules.chain([&value]) {
        if let Some(key) = ["includes", "excludes", "archMap"].into_iter().find(|key| {
            rule.get(key).is_some_and(|value| {
                value.as_object().is_none_or(|map| !map.is_empty())
                    && value.as_array().is_none_or(|list| !list.is_empty())
                    && !value.is_null()
            })
        }) {
            return Err(wrong(format!("`{key}` is not of the OCI runtime-spec's format")));
        }
    }
    serde_json::from_value(value).map_err(|error| wrong(error.to_string()))
}

fn default_profile(security: &cri::LinuxContainerSecurityContext) -> Result<LinuxSeccomp, Error> {
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
    Ok(profile)
}

fn refuse(calls: &[&str], errno: u32) -> Result<LinuxSyscall, Error> {
    Ok(LinuxSyscallBuilder::default()
        .names(calls.iter().map(|call| (*call).to_owned()).collect::<Vec<_>>())
        .action(LinuxSeccompAction::ScmpActErrno)
        .errno_ret(errno)
        .build()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn localhost(path: &str) -> Result<Option<LinuxSeccomp>, Error> {
        let profile =
            cri::SecurityProfile { profile_type: ProfileType::Localhost as i32, localhost_ref: path.into() };
        build(&cri::LinuxContainerSecurityContext { seccomp: Some(profile), ..Default::default() })
    }

    fn file(text: &str) -> Result<Option<LinuxSeccomp>, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        localhost(file.path().to_str().unwrap())
    }

    #[test]
    fn a_profile_is_read_from_the_hosts_file() {
        let text = r#"{"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}]}"#;
        let profile = file(text).unwrap().unwrap();
        assert_eq!(profile.default_action(), LinuxSeccompAction::ScmpActAllow);
        let rules = profile.syscalls().clone().unwrap();
        assert_eq!(rules.first().unwrap().names(), &["chmod".to_owned()]);
    }

    #[test]
    fn what_is_no_profile_is_refused_with_its_path() {
        for text in [
            "",
            "[]",
            "{}",
            r#"{"defaultAction": "SCMP_ACT_FLY"}"#,
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "archMap": [{"architecture": "SCMP_ARCH_X86_64"}]}"#,
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["x"], "action": "SCMP_ACT_ALLOW",
                "includes": {"caps": ["CAP_SYS_ADMIN"]}}]}"#,
        ] {
            let error = file(text).unwrap_err().to_string();
            assert!(error.contains("seccomp profile /"), "{error}");
        }
        for path in ["relative", "localhost/x", "", "/no/such/profile", "/dev/null", "/"] {
            assert!(localhost(path).is_err(), "{path}");
        }
        assert!(file(&" ".repeat(2 << 20)).unwrap_err().to_string().contains("larger"));
    }

    #[test]
    fn the_old_field_means_the_same() {
        let old = |words: &str| {
            #[allow(deprecated)]
            let security = cri::LinuxContainerSecurityContext {
                seccomp_profile_path: words.into(),
                ..Default::default()
            };
            build(&security)
        };
        assert!(old("").unwrap().is_none() && old("unconfined").unwrap().is_none());
        assert!(old("runtime/default").unwrap().is_some());
        assert!(old("localhost/no").is_err());
    }
}
