//! The AppArmor policy of the host's kernel, as securityfs shows it.
//!
//! Each directory `policy/profiles/<something>/` is a profile: the file `name` has its name,
//! and `raw_data` links to the load that it came with, `policy/raw_data/<n>/`,
//! with the binary policy as it was loaded and its `revision`, a number that
//! grows with every load. One load may have several profiles.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::{Error, MAX_POLICY};

/// The longest file with a name or a number that is read, bytes.
const MAX_TEXT: u64 = 8192;

/// How often a profile is read anew because it is replaced at the same time.
const ATTEMPTS: usize = 8;

/// The kernel's files.
#[derive(Debug)]
pub struct Kernel {
    /// The file that has `Y` when AppArmor is on.
    enabled: PathBuf,
    /// AppArmor's directory in securityfs.
    directory: PathBuf,
}

impl Default for Kernel {
    fn default() -> Self {
        Self {
            enabled: "/sys/module/apparmor/parameters/enabled".into(),
            directory: "/sys/kernel/security/apparmor".into(),
        }
    }
}

/// A profile that is loaded.
#[derive(Debug)]
pub struct Loaded {
    name: String,
    directory: PathBuf,
}

impl Kernel {
    /// Whether this kernel confines programs, and takes policy here: huskd may
    /// be in a container itself, without securityfs.
    #[must_use]
    pub fn can_confine(&self) -> bool {
        self.is_on() && self.profiles().is_dir()
    }

    fn is_on(&self) -> bool {
        read(&self.enabled, MAX_TEXT).is_ok_and(|word| word.starts_with(b"Y"))
    }

    fn profiles(&self) -> PathBuf {
        self.directory.join("policy/profiles")
    }

    /// The profile of that name. The name comes from a client: it is compared, and
    /// never part of a path.
    ///
    /// # Errors
    /// The profile is not loaded, or there is no AppArmor.
    pub fn find(&self, name: &str) -> Result<Loaded, Error> {
        if !self.is_on() {
            return Err(Error::Off(name.to_owned()));
        }
        let profiles = self.profiles();
        let failed = |cause: io::Error| match cause.kind() {
            io::ErrorKind::NotFound => Error::NotMounted { profile: name.to_owned(), path: profiles.clone() },
            _ => file(name, "read", &profiles)(cause),
        };
        for entry in fs::read_dir(&profiles).map_err(failed)? {
            let directory = entry.map_err(failed)?.path();
            match read(&directory.join("name"), MAX_TEXT) {
                Ok(found) if found.strip_suffix(b"\n").unwrap_or(&found) == name.as_bytes() => {
                    return Ok(Loaded { name: name.to_owned(), directory });
                }
                Ok(_) => {}
                // The profile was unloaded this moment.
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
                Err(cause) => return Err(file(name, "read the name of", &directory)(cause)),
            }
        }
        Err(Error::NotLoaded(name.to_owned()))
    }

    /// Loads the policy in a file, which has the profile of that name, unless
    /// this very policy is loaded already.
    ///
    /// # Errors
    /// The file cannot be read, or the kernel refuses it.
    pub fn provide(&self, name: &str, policy: &Path) -> Result<(), Error> {
        if !self.is_on() {
            return Err(Error::Off(name.to_owned()));
        }
        let wanted = read(policy, MAX_POLICY).map_err(file(name, "read", policy))?;
        match self.find(name).and_then(|loaded| loaded.policy(MAX_POLICY)) {
            Ok((_, content)) if content == wanted => return Ok(()),
            // The kernel has the profile, and does not export its policy.
            Err(Error::NotExported(_)) => return Ok(()),
            Ok(_) | Err(Error::NotLoaded(_)) => {}
            Err(error) => return Err(error),
        }
        let place = self.directory.join(".replace");
        let failed = file(name, "load into the kernel through", &place);
        // The policy is written at once, because each write is a policy of its own.
        let written = File::options().write(true).open(&place).and_then(|mut kernel| kernel.write(&wanted));
        match written {
            Ok(length) if length == wanted.len() => Ok(()),
            Ok(_) => Err(failed(io::ErrorKind::WriteZero.into())),
            Err(cause) => Err(failed(cause)),
        }
    }
}

impl Loaded {
    /// The number of the load that the profile came with, and that load's policy of at
    /// most `most` bytes.
    ///
    /// # Errors
    /// The kernel does not export it.
    pub fn policy(&self, most: u64) -> Result<(u64, Vec<u8>), Error> {
        let link = self.directory.join("raw_data");
        for _ in 0..ATTEMPTS {
            let target = match fs::read_link(&link) {
                Ok(target) => target,
                Err(cause) if cause.kind() == io::ErrorKind::NotFound && self.directory.exists() => {
                    return Err(Error::NotExported(self.name.clone()));
                }
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                    return Err(Error::NotLoaded(self.name.clone()));
                }
                Err(cause) => return Err(file(&self.name, "read link", &link)(cause)),
            };
            // The kernel removes the load when the profile is replaced, and its number grows when it is
            // loaded again.
            let content = self.directory.join(target);
            let revision = content.with_file_name("revision");
            let read_all = || -> io::Result<_> {
                let before = number(&revision)?;
                let bytes = read(&content, most)?;
                Ok((before, bytes, number(&revision)?))
            };
            match read_all() {
                Ok((before, bytes, after)) if before == after => return Ok((before, bytes)),
                Ok(_) => {}
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
                Err(cause) if cause.kind() == io::ErrorKind::FileTooLarge => {
                    return Err(Error::TooLarge(self.name.clone()));
                }
                Err(cause) => return Err(file(&self.name, "read", &content)(cause)),
            }
        }
        Err(Error::Unstable(self.name.clone()))
    }
}

fn number(path: &Path) -> io::Result<u64> {
    let text = String::from_utf8_lossy(&read(path, MAX_TEXT)?).into_owned();
    text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Reads a file to its end: the kernel reports a size of 0 for these files.
fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if File::open(path)?.take(most + 1).read_to_end(&mut bytes)? as u64 > most {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

fn file(profile: &str, stage: &'static str, path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    let (profile, path) = (profile.to_owned(), path.to_owned());
    move |cause| Error::File { profile: profile.clone(), stage, path: path.clone(), cause }
}

#[cfg(test)]
impl Kernel {
    /// A kernel whose files are below `root`.
    pub(super) fn at(root: &Path) -> Self {
        Self { enabled: root.join("enabled"), directory: root.join("apparmor") }
    }
}
