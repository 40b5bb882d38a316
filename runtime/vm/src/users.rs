//! The users that VMMs run as: one for each VMM, who owns nothing, and whom no
//! other VMM shares while it lives.
//!
//! A claim is a file named by the user, beside the machines' folders, which says
//! whose it is; the machine's own folder says which user it has. Both last as
//! long as the VMM may: over a restart of huskd, and not over one of the host.
//! A claim without its machine's folder holds no more.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_base::{dirs, lock};

/// The first of them. systemd gives users up to 0x6fff_ffff away, and husk
/// itself once gave from 0x7000_0000 on, by a hash.
const FIRST: u32 = 0x7100_0000;

/// How many there are.
const COUNT: u32 = 1 << 24;

/// Which user a machine has, in its folder.
const RECORD: &str = "user";

/// One claim at a time: others of this process would take the same stale one.
static CLAIMING: Mutex<()> = Mutex::new(());

/// A user for the VMM of the machine in `run_dir`, which is there.
///
/// # Errors
/// The file system's.
pub fn claim(run_dir: &Path) -> io::Result<u32> {
    let claims = claims(run_dir);
    dirs::make(&claims, dirs::ROOT_ONLY)?;
    let _one = lock(&CLAIMING);
    let owner = run_dir.as_os_str().as_encoded_bytes();
    // Where a search begins does not matter, but that it is short does.
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

/// Gives the user of a machine back whose VMM has ended, before its folder goes.
/// A claim that stays is no harm.
pub fn release(run_dir: &Path) {
    let Ok(user) = fs::read_to_string(run_dir.join(RECORD)) else { return };
    let Ok(user) = user.trim().parse::<u32>() else { return };
    let _one = lock(&CLAIMING);
    let claim = claims(run_dir).join(user.to_string());
    if owner(&claim).is_ok_and(|owner| owner == run_dir) {
        let _ = fs::remove_file(claim);
    }
}

/// Whether nobody has it any more, or the machine itself had it before.
fn is_stale(claim: &Path, run_dir: &Path) -> io::Result<bool> {
    let owner = owner(claim)?;
    Ok(owner == run_dir || !owner.try_exists()?)
}

fn owner(claim: &Path) -> io::Result<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    Ok(std::ffi::OsString::from_vec(fs::read(claim)?).into())
}

/// All machines' folders lie in folders of one folder.
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
        // These names have one hash, as the sums of their letters are made.
        let names = [("sandboxes", "Aa"), ("sandboxes", "BB"), ("templates", "Aa")];
        let machines = names.map(|(kind, name)| machine(base.path(), kind, name));
        let users: Vec<u32> = machines.iter().map(|machine| claim(machine).unwrap()).collect();
        assert!(users[0] != users[1] && users[1] != users[2] && users[0] != users[2], "{users:?}");
        assert_eq!(users[1], users[0] + 1);
        for user in users {
            assert!((FIRST..FIRST + COUNT).contains(&user));
        }
    }

    #[test]
    fn a_user_is_free_again_when_its_machine_has_gone() {
        let base = tempfile::tempdir().unwrap();
        let (first, second) =
            (machine(base.path(), "sandboxes", "Aa"), machine(base.path(), "sandboxes", "BB"));
        let user = claim(&first).unwrap();
        assert_ne!(claim(&second).unwrap(), user);
        // Asked for twice, it is the same.
        assert_eq!(claim(&first).unwrap(), user);
        release(&second);
        release(&first);
        assert_eq!(fs::read_dir(base.path().join("users")).unwrap().count(), 0);
        // A huskd that died had no time to give anything back.
        assert_eq!(claim(&first).unwrap(), user);
        fs::remove_dir_all(&first).unwrap();
        assert_eq!(claim(&second).unwrap(), user);
        // Nobody gives back what another has.
        let third = machine(base.path(), "sandboxes", "Aa");
        fs::write(third.join(RECORD), user.to_string()).unwrap();
        release(&third);
        assert_ne!(claim(&third).unwrap(), user);
    }
}
