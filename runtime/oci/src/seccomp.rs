//! Seccomp profiles: a file of the host's, or `RuntimeDefault`. The latter allows the calls that
//! programs make, and none that could change the system as a whole, reach into
//! the kernel's rarely used parts, or escape a container. Some of those are allowed
//! with the capability that governs them.

use std::path::Path;

use husk_base::text_file;
use husk_proto::cri::{self, security_profile::ProfileType};
use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg,
    LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use super::{Error, process};

mod calls;

/// `CLONE_NEW*` of `clone(2)`: time, mount, cgroup, uts, ipc, user, pid and net.
const CLONE_NEW: u64 =
    0x80 | 0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;

const ENOSYS: u32 = 38;

/// `AF_VSOCK` of `socket(2)`: it reaches the host, past the pod's network.
const AF_VSOCK: u64 = 40;

/// The values that `personality(2)` may have: Linux, its 32-bit personality, each also
/// with an old kernel's version, and the query of the present one.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x0002_0000, 0x0002_0008, 0xffff_ffff];

/// The largest profile that is read from a file, bytes.
const MAX_PROFILE: u64 = 1 << 20;

/// The profile that the client asked for; `None` for none.
pub(super) fn build(security: &cri::LinuxContainerSecurityContext) -> Result<Option<LinuxSeccomp>, Error> {
    match asked(security)? {
        Asked::Unconfined => Ok(None),
        Asked::File(path) => from_file(path).map(Some),
        Asked::Default => default_profile(&process::capabilities(security)?).map(Some),
    }
}

enum Asked<'a> {
    Unconfined,
    Default,
    File(&'a Path),
}

/// The profile that a request asks for. A request without a profile asks for none; the deprecated
/// field has the values of Kubernetes' annotations.
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

/// Reads a profile in the form of the OCI runtime-spec, `linux.seccomp`.
fn from_file(path: &Path) -> Result<LinuxSeccomp, Error> {
    let wrong = |what: String| Error::Invalid(format!("seccomp profile {}: {what}", path.display()));
    let text = text_file::read(path, MAX_PROFILE).map_err(|error| wrong(error.to_string()))?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let rules = value.get("syscalls").and_then(serde_json::Value::as_array).into_iter().flatten();
    // Rules of Docker's own format depend on these keys; without them the rules would
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

/// The profile `RuntimeDefault`. `capabilities` are all that the container's processes can get.
fn default_profile(capabilities: &Capabilities) -> Result<LinuxSeccomp, Error> {
    let has = |name: &str| name.parse().is_ok_and(|one: Capability| capabilities.contains(&one));
    let mut rules = vec![allow(calls::allowed(has), None)?];
    rules.push(allow_if("socket", LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK, None)?);
    for personality in PERSONALITIES {
        rules.push(allow_if("personality", LinuxSeccompOperator::ScmpCmpEq, personality, None)?);
    }
    if !has("SYS_ADMIN") {
        rules.push(allow_if("clone", LinuxSeccompOperator::ScmpCmpMaskedEq, CLONE_NEW, Some(0))?);
        // The flags of clone3 are behind a pointer, which a filter cannot read; libraries
        // fall back to clone when clone3 does not exist.
        let missing = LinuxSyscallBuilder::default().names(vec!["clone3".to_owned()]);
        rules.push(missing.action(LinuxSeccompAction::ScmpActErrno).errno_ret(ENOSYS).build()?);
    }
    // All other calls fail with EPERM.
    let profile = LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .architectures(vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32])
        .syscalls(rules)
        .build()?;
    Ok(profile)
}

fn allow(calls: Vec<String>, argument: Option<LinuxSeccompArg>) -> Result<LinuxSyscall, Error> {
    let rule = LinuxSyscallBuilder::default().names(calls).action(LinuxSeccompAction::ScmpActAllow);
    Ok(match argument {
        Some(argument) => rule.args(vec![argument]),
        None => rule,
    }
    .build()?)
}

/// A rule that allows a call if its first argument compares so. With a second value, the
/// first one is a mask.
fn allow_if(
    call: &str,
    operator: LinuxSeccompOperator,
    value: u64,
    second: Option<u64>,
) -> Result<LinuxSyscall, Error> {
    let argument = LinuxSeccompArgBuilder::default().index(0usize).value(value).op(operator);
    let argument = match second {
        Some(second) => argument.value_two(second),
        None => argument,
    };
    allow(vec![call.to_owned()], Some(argument.build()?))
}

#[cfg(test)]
mod tests {
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

    fn profile_of(add: &[&str], drop: &[&str], ambient: &[&str]) -> LinuxSeccomp {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let capabilities = cri::Capability {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            add_ambient_capabilities: owned(ambient),
        };
        let default =
            cri::SecurityProfile { profile_type: ProfileType::RuntimeDefault as i32, ..Default::default() };
        let security = cri::LinuxContainerSecurityContext {
            capabilities: Some(capabilities),
            seccomp: Some(default),
            ..Default::default()
        };
        build(&security).unwrap().unwrap()
    }

    #[test]
    fn calls_come_with_the_capabilities_that_a_container_ends_up_with() {
        let allows = |profile: &LinuxSeccomp, call: &str| {
            profile.syscalls().iter().flatten().any(|rule| {
                rule.action() == LinuxSeccompAction::ScmpActAllow
                    && rule.args().is_none()
                    && rule.names().iter().any(|name| name == call)
            })
        };
        let most = profile_of(&["ALL"], &["SYS_ADMIN", "cap_bpf"], &[]);
        for call in ["mount", "unshare", "clone3", "bpf"] {
            assert!(!allows(&most, call), "{call}");
        }
        assert!(allows(&most, "reboot"));
        let ambient = profile_of(&[], &["ALL"], &["CAP_SYS_TIME"]);
        assert!(allows(&ambient, "settimeofday") && !allows(&ambient, "mount"));
        assert!(allows(&profile_of(&["SYS_ADMIN"], &["ALL"], &[]), "mount"));
    }

    #[test]
    fn the_default_allows_what_it_names_and_looks_at_arguments() {
        let profile = |capability: &str| profile_of(&[capability], &[], &[]);
        assert_eq!(profile("NET_ADMIN").default_action(), LinuxSeccompAction::ScmpActErrno);
        // The action for a call, and the comparison of its first argument.
        let rules = |capability: &str, call: &str| {
            let rules = profile(capability).syscalls().clone().unwrap();
            let rules = rules.into_iter().filter(|rule| rule.names().iter().any(|name| name == call));
            rules
                .map(|rule| {
                    let argument = rule.args().as_ref().and_then(|all| all.first().copied());
                    let argument = argument.map(|it| (it.op(), it.value(), it.value_two()));
                    (rule.action(), argument, rule.errno_ret())
                })
                .collect::<Vec<_>>()
        };
        let (allow, refuse) = (LinuxSeccompAction::ScmpActAllow, LinuxSeccompAction::ScmpActErrno);
        assert_eq!(rules("NET_ADMIN", "openat"), [(allow, None, None)]);
        assert!(rules("NET_ADMIN", "mount").is_empty() && rules("ALL", "io_uring_setup").is_empty());
        assert_eq!(rules("CAP_SYS_ADMIN", "mount"), [(allow, None, None)]);
        assert_eq!(rules("all", "clone3"), [(allow, None, None)]);
        assert_eq!(rules("NET_ADMIN", "clone3"), [(refuse, None, Some(ENOSYS))]);
        let socket = (LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK, None);
        assert_eq!(rules("ALL", "socket"), [(allow, Some(socket), None)]);
        let clone = (LinuxSeccompOperator::ScmpCmpMaskedEq, CLONE_NEW, Some(0));
        assert_eq!(rules("NET_ADMIN", "clone"), [(allow, Some(clone), None)]);
        assert_eq!(rules("ALL", "personality").len(), PERSONALITIES.len());
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
