//! AppArmor profiles of containers.
//!
//! `Localhost` is a profile that is loaded in the host's kernel. On the host a
//! container simply gets it, by its name; to a guest huskd sends the binary
//! policy, read back from the host's kernel. `RuntimeDefault` is a
//! profile of Husk's own, [`DEFAULT_PROFILE`], whose policy is in the guest's root;
//! on the host huskd loads it when it is first needed. Containers whose clients name no profile
//! have it too, wherever AppArmor is on.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use husk_proto::agent::{self, DEFAULT_PROFILE};
use husk_proto::cri::{self, security_profile::ProfileType};

mod kernel;

pub use kernel::Kernel;

/// The most policy that one request sends to a guest, bytes.
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
    /// The kernel's files are not mounted.
    #[error(
        "AppArmor profile `{profile}`: {path} is not there: mount -t securityfs securityfs /sys/kernel/security"
    )]
    NotMounted {
        /// The profile that was asked for.
        profile: String,
        /// The directory where profiles should be.
        path: PathBuf,
    },
    /// The host's kernel does not have the profile.
    #[error("AppArmor profile `{0}` is not loaded on this host: load it with apparmor_parser --replace FILE")]
    NotLoaded(String),
    /// The host's kernel has the profile, and does not export its policy.
    #[error(
        "AppArmor profile `{0}` is loaded, but the host's kernel keeps no binary policy that a machine could \
         have: it needs CONFIG_SECURITY_APPARMOR_EXPORT_BINARY and apparmor.export_binary=1 when the profile is loaded"
    )]
    NotExported(String),
    /// The profile was replaced again and again while it was read.
    #[error("AppArmor profile `{0}` changes on the host all the time: try again")]
    Unstable(String),
    /// The policy is far larger than real ones are.
    #[error(
        "AppArmor profile `{0}`: its policy, and that of the pod's other profiles, has more than {MAX_POLICY} \
         bytes: load it with apparmor_parser from a file of its own"
    )]
    TooLarge(String),
    /// A file of the kernel's, or Husk's own profile.
    #[error("AppArmor profile `{profile}`: {stage} {path}: {cause}")]
    File {
        /// The profile that was asked for.
        profile: String,
        /// The step that failed.
        stage: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        cause: io::Error,
    },
}

/// The profile that a client asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// The request has no profile: the default one, where there is AppArmor.
    Unsaid,
    /// No profile.
    Unconfined,
    Default,
    Localhost(String),
}

/// The confinement of a container.
#[derive(Debug, Default)]
pub struct Confinement {
    /// The name of the profile; `None` for no profile.
    pub profile: Option<String>,
    /// The policies that the guest needs for the profile; `None` on the host.
    pub for_machine: Option<agent::AppArmor>,
}

/// The profile of a container in a VM, with the policy that the guest
/// needs. `others` are the pod's containers, whose profiles may be in the same
/// policy, or in a later one.
///
/// # Errors
/// The profile that the client asks for cannot be had.
pub fn in_machine(
    kernel: &Kernel,
    config: &cri::ContainerConfig,
    others: &[cri::ContainerConfig],
) -> Result<Confinement, Error> {
    let (profile, for_machine) = match asked(config)? {
        Asked::Unconfined => return Ok(Confinement::default()),
        // Only the guest knows whether its kernel has AppArmor.
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

/// The profile of a container on the host. `default_policy` is the file of Husk's own
/// profile.
///
/// # Errors
/// The profile that the client asks for cannot be had.
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

/// The profile that a request asks for. The deprecated field counts where the new one is absent,
/// and has the values of Kubernetes' annotations.
fn asked(config: &cri::ContainerConfig) -> Result<Asked, Error> {
    let Some(security) = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref()) else {
        return Ok(Asked::Unsaid);
    };
    #[allow(deprecated)]
    let old = security.apparmor_profile.as_str();
    let (kind, name) = match (&security.apparmor, old) {
        (Some(profile), _) => (profile.profile_type, profile.localhost_ref.as_str()),
        // As with other runtimes a privileged container is not confined, unless its client names a
        // profile.
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

/// The policy that has `name`, and those of the profiles of the other
/// containers. One load may have several profiles, of which one was
/// replaced by a later load, and the kernel exports loads as a whole. Loaded in the same
/// order, they leave the guest's kernel with the profiles of the host's.
fn policies(
    kernel: &Kernel,
    name: &str,
    others: &[cri::ContainerConfig],
) -> Result<Vec<agent::AppArmorPolicy>, Error> {
    let mut loads = BTreeMap::new();
    loads.extend([kernel.find(name)?.policy(MAX_POLICY)?]);
    for other in others {
        // A profile that was unloaded since stays in the guest as it is.
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
