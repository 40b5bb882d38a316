//! AppArmor profiles for the machine's containers. A policy is loaded into the
//! kernel before runc names its profile, and stays for as long as the machine
//! lives.
//!
//! On the host, huskd loads the policies.

use std::fs::{self, File};
use std::io::{self, Write};

use husk_proto::agent::{AppArmor, AppArmorPolicy};
use nix::mount::MsFlags;
use tokio::sync::Mutex;

use crate::guest::mounts::{self, mount};

const SECURITYFS: &str = "/sys/kernel/security";

/// The file that loads a policy, which must be one write. Profiles with the
/// same names are replaced, also for processes that run.
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";

/// The policy of the default profile, a file of the machine's root.
const DEFAULT_POLICY: &str = "/usr/share/husk/husk-default.apparmor";

/// A policy that a container needs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// securityfs, which loads policies, could not be mounted.
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    /// The kernel has no AppArmor.
    #[error(
        "the machine's kernel has no AppArmor: its handler's `kernel` must be built with \
         CONFIG_SECURITY_APPARMOR, and `kernel_cmdline` not say otherwise"
    )]
    NoAppArmor,
    /// The kernel refuses the policy.
    #[error(
        "the machine's kernel refuses the policy of {size} bytes: {cause}: load one on the host that is \
         compiled for Linux 6.12 or older (apparmor_parser --policy-features)"
    )]
    Refused { size: usize, cause: io::Error },
    /// The machine's root file system has no default policy.
    #[error("read {DEFAULT_POLICY}: {0}: the handler's `rootfs` is not of this version of Husk")]
    NoDefault(io::Error),
}

/// The policies that were loaded.
#[derive(Default)]
pub struct Policies {
    given: Mutex<Given>,
}

#[derive(Default)]
struct Given {
    mounted: bool,
    /// Whether the default profile is loaded.
    default: bool,
    /// The numbers of the host's policies that were loaded last.
    revisions: Vec<u64>,
}

impl Policies {
    /// Loads the policies that a container needs. False when the kernel has no
    /// AppArmor, and the container needs none.
    pub async fn load(&self, wanted: &AppArmor) -> Result<bool, Error> {
        match self.load_all(wanted).await {
            Err(Error::NoAppArmor) if wanted.unless_off => Ok(false),
            other => other.map(|()| true),
        }
    }

    async fn load_all(&self, wanted: &AppArmor) -> Result<(), Error> {
        let mut given = self.given.lock().await;
        if !given.mounted {
            match mount("securityfs", SECURITYFS, "securityfs", flags(), "") {
                Err(error) if error.is_busy() => {}
                Err(mounts::Error::Mount {
                    cause: nix::errno::Errno::ENOENT | nix::errno::Errno::ENODEV,
                    ..
                }) => {
                    return Err(Error::NoAppArmor);
                }
                other => other?,
            }
            given.mounted = true;
        }
        given.update(wanted, || fs::read(DEFAULT_POLICY).map_err(Error::NoDefault), replace)
    }
}

fn flags() -> MsFlags {
    MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
}

impl Given {
    fn update(
        &mut self,
        wanted: &AppArmor,
        default: impl FnOnce() -> Result<Vec<u8>, Error>,
        mut replace: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if wanted.default_profile && !self.default {
            replace(&default()?)?;
            self.default = true;
        }
        let revisions = || wanted.policies.iter().map(|policy| policy.revision);
        if wanted.policies.is_empty() || revisions().eq(self.revisions.iter().copied()) {
            return Ok(());
        }
        // A later policy may have replaced a profile of an earlier one, so all are loaded again,
        // in their order.
        self.revisions.clear();
        for AppArmorPolicy { content, .. } in &wanted.policies {
            replace(content)?;
        }
        self.revisions.extend(revisions());
        Ok(())
    }
}

fn replace(policy: &[u8]) -> Result<(), Error> {
    let mut file = File::options().write(true).open(REPLACE).map_err(|cause| match cause.kind() {
        io::ErrorKind::NotFound => Error::NoAppArmor,
        _ => Error::Refused { size: policy.len(), cause },
    })?;
    match file.write(policy) {
        Ok(length) if length == policy.len() => Ok(()),
        Ok(_) => Err(Error::Refused { size: policy.len(), cause: io::ErrorKind::WriteZero.into() }),
        Err(cause) => Err(Error::Refused { size: policy.len(), cause }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_host(revisions: &[u64]) -> AppArmor {
        let policy = |revision: &u64| AppArmorPolicy { revision: *revision, content: vec![*revision as u8] };
        AppArmor { policies: revisions.iter().map(policy).collect(), ..Default::default() }
    }

    /// Updates the policies of a kernel that refuses the policy `[9]`; returns
    /// the policies that the kernel was given.
    fn update(given: &mut Given, wanted: &AppArmor) -> (Vec<Vec<u8>>, Result<(), Error>) {
        let mut written = Vec::new();
        let result = given.update(
            wanted,
            || Ok(b"default".to_vec()),
            |policy| match policy {
                [9] => Err(Error::NoAppArmor),
                policy => {
                    written.push(policy.to_vec());
                    Ok(())
                }
            },
        );
        (written, result)
    }

    #[test]
    fn the_same_policy_is_loaded_once_and_all_of_it_when_one_changes() {
        let mut given = Given::default();
        let mut written = |revisions: &[u64]| update(&mut given, &of_host(revisions)).0;
        assert_eq!(written(&[3]), [[3]]);
        assert!(written(&[3]).is_empty());
        assert_eq!(written(&[2, 3]), [[2], [3]]);
        assert!(written(&[2, 3]).is_empty());
        assert_eq!(written(&[3, 4]), [[3], [4]]);
    }

    #[test]
    fn after_a_refusal_everything_is_loaded_again() {
        let mut given = Given::default();
        assert!(update(&mut given, &of_host(&[3])).1.is_ok());
        assert!(update(&mut given, &of_host(&[4, 9])).1.is_err());
        assert_eq!(update(&mut given, &of_host(&[3])).0, [[3]]);
    }

    #[test]
    fn the_default_profile_is_loaded_once_beside_the_hosts() {
        let mut given = Given::default();
        let default = AppArmor { default_profile: true, ..Default::default() };
        assert_eq!(update(&mut given, &default).0, [b"default"]);
        assert_eq!(update(&mut given, &of_host(&[3])).0, [[3]]);
        assert!(update(&mut given, &default).0.is_empty());
        assert!(update(&mut given, &of_host(&[3])).0.is_empty());
    }
}
