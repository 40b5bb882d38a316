//! AppArmor profiles of containers.
//!
//! `Localhost` is a profile that is loaded in the host's kernel. On the host a
//! container simply gets it, by its name; into a machine huskd takes its binary
//! policy along, read back from the host's kernel. `RuntimeDefault` is a
//! profile of Husk's own, [`DEFAULT_PROFILE`], whose policy the guest's root
//! has; on the host it is loaded when it is first needed. It is also what a
//! container has whose client says nothing, wherever AppArmor is on.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use husk_proto::agent::{self, DEFAULT_PROFILE};
use husk_proto::cri::{self, security_profile::ProfileType};

mod kernel;

pub use kernel::Kernel;

/// Most policy that one request takes into a machine, bytes.
const MAX_POLICY: u64 = 2 << 20;

/// A container cannot have its profile.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense.
    #[error("AppArmor profile: {0}")]
    Invalid(String),
    /// The host has no AppArmor.
    #[error(
        "AppArmor profile `{0}`: the host's kernel has no AppArmor, or has it off: boot with apparmor=1 \
         lsm=…,apparmor, or do not ask for a profile"
    )]
    Off(String),
    /// It is not to be seen what is loaded.
    #[error(
        "AppArmor profile `{profile}`: {path} is not there: mount -t securityfs securityfs /sys/kernel/security"
    )]
    NotMounted {
        /// What was asked for.
        profile: String,
        /// Where profiles should be.
        path: PathBuf,
    },
    /// The host's kernel does not have it.
    #[error("AppArmor profile `{0}` is not loaded on this host: load it with apparmor_parser --replace FILE")]
    NotLoaded(String),
    /// The host's kernel has it, and does not tell what it is.
    #[error(
        "AppArmor profile `{0}` is loaded, but the host's kernel keeps no binary policy that a machine could \
         have: it needs CONFIG_SECURITY_APPARMOR_EXPORT_BINARY and apparmor.export_binary=1 when the profile is loaded"
    )]
    NotExported(String),
    /// It was replaced again and again while it was read.
    #[error("AppArmor profile `{0}` changes on the host all the time: try again")]
    Unstable(String),
    /// Its policy is far larger than one is.
    #[error(
        "AppArmor profile `{0}`: its policy, and that of the pod's other profiles, has more than {MAX_POLICY} \
         bytes: load it with apparmor_parser from a file of its own"
    )]
    TooLarge(String),
    /// A file of the kernel's, or Husk's own profile.
    #[error("AppArmor profile `{profile}`: {stage} {path}: {cause}")]
    File {
        /// What was asked for.
        profile: String,
        /// What was being done.
        stage: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
}

/// What a client asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// Nothing is said: the default, where there is AppArmor.
    Unsaid,
    /// No profile.
    Unconfined,
    Default,
    Localhost(String),
}

/// What a container gets.
#[derive(Debug, Default)]
pub struct Confinement {
    /// The name of its profile; none for no profile.
    pub profile: Option<String>,
    /// What its machine needs for that; nothing on the host.
    pub for_machine: Option<agent::AppArmor>,
}

/// The profile of a container in a machine, with the policy that the machine
/// needs. `others` are the pod's containers, whose profiles may be in the same
/// policy, or in a later one.
///
/// # Errors
/// What the client asks for cannot be had.
pub fn in_machine(
    kernel: &Kernel,
    config: &cri::ContainerConfig,
    others: &[cri::ContainerConfig],
) -> Result<Confinement, Error> {
    let (profile, for_machine) = match asked(config)? {
        Asked::Unconfined => return Ok(Confinement::default()),
        // Only the machine knows whether its kernel has AppArmor.
        asked @ (Asked::Unsaid | Asked::Default) => {
            let unless_off = asked == Asked::Unsaid;
            let needed = agent::AppArmor { default_profile: true, unless_off, ..Default::default() };
            (DEFAULT_PROFILE.to_owned(), needed)
        }
        Asked::Localhost(name) => {
            let policies = policies(kernel, &name, others)?;
            (name, agent::AppArmor { policies, ..Default::default() })
        }
    };
    Ok(Confinement { profile: Some(profile), for_machine: Some(for_machine) })
}

/// The profile of a container on the host. `default_policy` is the file with
/// Husk's own.
///
/// # Errors
/// What the client asks for cannot be had.
pub fn on_host(
    kernel: &Kernel,
    config: &cri::ContainerConfig,
    default_policy: &Path,
) -> Result<Confinement, Error> {
    let profile = match asked(config)? {
        Asked::Unconfined => None,
        Asked::Unsaid if !kernel.can_confine() => None,
        Asked::Unsaid | Asked::Default => {
            kernel.provide(DEFAULT_PROFILE, default_policy)?;
            Some(DEFAULT_PROFILE.to_owned())
        }
        Asked::Localhost(name) => {
            kernel.find(&name)?;
            Some(name)
        }
    };
    Ok(Confinement { profile, for_machine: None })
}

/// The old field counts where the new one is absent; its words are those of
/// Kubernetes' annotations.
fn asked(config: &cri::ContainerConfig) -> Result<Asked, Error> {
    let Some(security) = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref()) else {
        return Ok(Asked::Unsaid);
    };
    #[allow(deprecated)]
    let old = security.apparmor_profile.as_str();
    let (kind, name) = match (&security.apparmor, old) {
        (Some(profile), _) => (profile.profile_type, profile.localhost_ref.as_str()),
        // It may do everything, as elsewhere; a profile by name is the client's will.
        (None, "") if security.privileged => return Ok(Asked::Unconfined),
        (None, "") => return Ok(Asked::Unsaid),
        (None, "unconfined") => return Ok(Asked::Unconfined),
        (None, "runtime/default") => (ProfileType::RuntimeDefault as i32, ""),
        (None, name) if name.starts_with("localhost/") => (ProfileType::Localhost as i32, name),
        (None, word) => {
            let problem = format!("`{word}` is none of: runtime/default, unconfined, localhost/NAME");
            return Err(Error::Invalid(problem));
        }
    };
    match ProfileType::try_from(kind) {
        Ok(ProfileType::Unconfined) => Ok(Asked::Unconfined),
        Ok(ProfileType::RuntimeDefault) if security.privileged => Ok(Asked::Unconfined),
        Ok(ProfileType::RuntimeDefault) => Ok(Asked::Default),
        Ok(ProfileType::Localhost) => match name.strip_prefix("localhost/").unwrap_or(name) {
            "" => Err(Error::Invalid("type `Localhost` needs a name in `localhost_ref`".into())),
            name => Ok(Asked::Localhost(name.to_owned())),
        },
        Err(_) => Err(Error::Invalid(format!("unknown type {kind}"))),
    }
}

/// The policy that has `name`, and that of the profiles of the other
/// containers: one load may have brought several profiles of which one was
/// replaced by a later load, and the kernel hands out loads as a whole. In the
/// order in which they were loaded, they make the guest's kernel what the
/// host's is.
fn policies(
    kernel: &Kernel,
    name: &str,
    others: &[cri::ContainerConfig],
) -> Result<Vec<agent::AppArmorPolicy>, Error> {
    let mut loads = BTreeMap::new();
    loads.extend([kernel.find(name)?.policy(MAX_POLICY)?]);
    for other in others {
        // A profile that was unloaded since stays in the machine as it is.
        let Ok(Asked::Localhost(other)) = asked(other) else { continue };
        match kernel.find(&other).and_then(|found| found.policy(MAX_POLICY)) {
            Ok(load) => loads.extend([load]),
            Err(Error::NotLoaded(_)) => {}
            Err(error) => return Err(error),
        }
    }
    if loads.values().map(|content| content.len() as u64).sum::<u64>() > MAX_POLICY {
        return Err(Error::TooLarge(name.to_owned()));
    }
    Ok(loads.into_iter().map(|(revision, content)| agent::AppArmorPolicy { revision, content }).collect())
}

#[cfg(test)]
mod tests;
