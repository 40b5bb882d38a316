//! Folders and files of huskd's own, with modes that say what the node's other users may
//! do with them.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::id::SandboxId;

/// The mode of a folder that only root enters.
pub const ROOT_ONLY: u32 = 0o700;

/// The mode of a folder that other users pass through, if they know the name of their own
/// file below it.
pub const TRAVERSE_ONLY: u32 = 0o711;

/// The folder of a pod's sockets and logs, below huskd's run directory.
#[must_use]
pub fn sandbox_run_dir(run_dir: &Path, id: &SandboxId) -> PathBuf {
    // A unix socket's path has at most 107 bytes.
    run_dir.join("sandboxes").join(id.short())
}

/// Makes a folder with this mode; a folder that is there already gets the mode.
///
/// # Errors
/// The file system's.
pub fn make(path: &Path, mode: u32) -> io::Result<()> {
    // The mode holds from the first moment; the second call gives what the umask took.
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Makes a file that only root can read and write, or empties the one that is there.
///
/// # Errors
/// The file system's.
pub fn private_file(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_its_mode_whether_or_not_it_was_there() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("outer/inner");
        let mode = || fs::metadata(&folder).unwrap().permissions().mode() & 0o7777;
        for wanted in [TRAVERSE_ONLY, ROOT_ONLY, TRAVERSE_ONLY] {
            make(&folder, wanted).unwrap();
            assert_eq!(mode(), wanted);
        }
        fs::set_permissions(&folder, Permissions::from_mode(0o1777)).unwrap();
        make(&folder, ROOT_ONLY).unwrap();
        assert_eq!(mode(), ROOT_ONLY);
    }
}
