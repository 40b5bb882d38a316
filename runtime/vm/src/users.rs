//! The users that VMMs run as: each VMM has its own, which owns nothing, and which no
//! other VMM has while it lives.
//!
//! A claim is a file named after the user, beside the run directories of VMs. It names the
//! directory of the VM that has the user, and a file in that directory names the user. Both last
//! as long as the VMM may: over a restart of huskd, and not over one of the host.
//! A claim is void without the VM's directory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_base::{dirs, lock};

/// The first user. systemd gives away users up to 0x6fff_ffff, and earlier releases of Husk
/// took users from 0x7000_0000 on, by a hash.
const FIRST: u32 = 0x7100_0000;

/// The number of users.
const COUNT: u32 = 1 << 24;

/// The name of the file in a VM's run directory that names its user.
const RECORD: &str = "user";

/// Held while a user is claimed: others of this process would take the same stale claim.
static CLAIMING: Mutex<()> = Mutex::new(());

/// Claims a user for the VMM of the VM whose directory is `run_dir`, which must exist.
///
/// # Errors
/// The file system's error.
pub fn claim(run_dir: &Path) -> io::Result<u32> {
    let claims = claims(run_dir);
    dirs::make(&claims, dirs::ROOT_ONLY)?;
    let _one = lock(&CLAIMING);
    let owner = run_dir.as_os_str().as_encoded_bytes();
    // Searches that begin at different users are short.
    let start = owner.iter().fold(0u32, |hash, byte| hash.wrapping_mul(31).wrapping_add((*byte).into()));
    for step in 0..COUNT {
        let user = FIRST + start.wrapping_add(step) % COUNT;
        let claim = claims.join(user.to_string());
        match File::options().write(true).create_new(true).open(&claim) {
            Ok(mut file) => {
                file.write_all(owner)?;
                fs::write(run_dir.join(RECORD), user.to_string())?;
                return Ok(user);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if is_stale(&claim, run_dir)? {
                    fs::write(&claim, owner)?;
                    fs::write(run_dir.join(RECORD), user.to_string())?;
                    return Ok(user);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("every user is taken"))
}

/// The user of the machine in `run_dir`, if it has one that is no other machine's.
pub fn of(run_dir: &Path) -> Option<u32> {
    let user = fs::read_to_string(run_dir.join(RECORD)).ok()?.trim().parse().ok()?;
    let owner = owner(&claims(run_dir).join(format!("{user}"))).ok()?;
    (owner == run_dir && (FIRST..FIRST + COUNT).contains(&user)).then_some(user)
}

/// Releases the user of a VM whose VMM has ended, before its directory is removed.
/// A claim that stays does no harm.
pub fn release(run_dir: &Path) {
    let _one = lock(&CLAIMING);
    if let Some(user) = of(run_dir) {
        let _ = fs::remove_file(claims(run_dir).join(user.to_string()));
    }
}

/// Whether a claim is void, or is this VM's own.
fn is_stale(claim: &Path, run_dir: &Path) -> io::Result<bool> {
    let owner = owner(claim)?;
    Ok(owner == run_dir || !owner.try_exists()?)
}

fn owner(claim: &Path) -> io::Result<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    Ok(std::ffi::OsString::from_vec(fs::read(claim)?).into())
}

/// The directory of the claims. The VMs' directories are two levels below its parent.
fn claims(run_dir: &Path) -> PathBuf {
    let base = run_dir.parent().and_then(Path::parent).unwrap_or(run_dir);
    base.join("users")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(base: &Path, kind: &str, name: &str) -> PathBuf {
        let run_dir = base.join(kind).join(name);
        fs::create_dir_all(&run_dir).unwrap();
        run_dir
    }

    #[test]
    fn no_two_machines_share_a_user_while_they_live() {
        let base = tempfile::tempdir().unwrap();
        // These names have the same hash.
        let names = [("sandboxes", "Aa"), ("sandboxes", "BB"), ("templates", "Aa")];
        let machines = names.map(|(kind, name)| machine(base.path(), kind, name));
        let users: Vec<u32> = machines.iter().map(|machine| claim(machine).unwrap()).collect();
        assert!(users[0] != users[1] && users[1] != users[2] && users[0] != users[2], "{users:?}");
        assert_eq!(users[1], users[0] + 1);
        for (user, machine) in users.into_iter().zip(&machines) {
            assert!((FIRST..FIRST + COUNT).contains(&user));
            assert_eq!(of(machine), Some(user));
        }
    }

    #[test]
    fn a_user_is_free_again_when_its_machine_has_gone() {
        let base = tempfile::tempdir().unwrap();
        let (first, second) =
            (machine(base.path(), "sandboxes", "Aa"), machine(base.path(), "sandboxes", "BB"));
        let user = claim(&first).unwrap();
        assert_ne!(claim(&second).unwrap(), user);
        // A second claim answers the same user.
        assert_eq!(claim(&first).unwrap(), user);
        release(&second);
        release(&first);
        assert_eq!(fs::read_dir(base.path().join("users")).unwrap().count(), 0);
        // A huskd that died has released nothing.
        assert_eq!(claim(&first).unwrap(), user);
        fs::remove_dir_all(&first).unwrap();
        assert_eq!(claim(&second).unwrap(), user);
        // A VM does not release the user of another.
        let third = machine(base.path(), "sandboxes", "Aa");
        fs::write(third.join(RECORD), user.to_string()).unwrap();
        assert_eq!(of(&third), None);
        release(&third);
        assert_ne!(claim(&third).unwrap(), user);
    }
}
