//! The packer: it packs the files of an image with `mkfs.erofs`, in a jail.
//!
//! `mkfs.erofs` walks files whose names, attributes and contents an image's author chose.
//! huskd starts itself once more, as for the unpacker, and that process becomes
//! `mkfs.erofs` once it has given up all else (`jail`).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use husk_base::chain;

use super::{FILES, jail};

/// The first argument of the packer.
pub(crate) const PACK: &str = "--pack";

/// The file that is made, in the folder of a pull.
pub(crate) const PACKED: &str = "rootfs.erofs";

/// The program, which is searched for in `PATH`.
const PROGRAM: &str = "mkfs.erofs";

/// The folder of temporary files, where the C library has them (tmpfile(3)).
const TEMPORARY: &str = "tmp";

/// An empty folder that becomes the packer's root.
const ROOT: &str = "root";

/// Packs the files in the folder of a pull; the arguments are that folder, the most bytes
/// that the file may have, and options of `mkfs.erofs`. Returns only with what went wrong.
pub(super) fn main(mut arguments: impl Iterator<Item = OsString>) -> String {
    let (workspace, largest) = (arguments.next(), arguments.next());
    let largest = largest.and_then(|text| text.to_str()?.parse().ok());
    let (Some(workspace), Some(largest)) = (workspace, largest) else {
        return format!("usage: {} {PACK} FOLDER BYTES [OPTION...]; it is started by huskd", super::NAME);
    };
    let workspace = PathBuf::from(workspace);
    let program = match find() {
        Ok(program) => program,
        Err(error) => return format!("find it in PATH: {error}"),
    };
    if let Err(error) = prepare(&workspace) {
        return format!("make files in {}: {error}", workspace.display());
    }
    let shown =
        jail::Shown { input: FILES, output: PACKED, temporary: TEMPORARY, root: ROOT, program: &program };
    if let Err(error) = jail::enter_to_pack(&workspace, &shown, largest) {
        return chain(&error);
    }
    let root = Path::new("/");
    let mut mkfs = Command::new(&program);
    mkfs.args(arguments).arg(root.join(PACKED)).arg(root.join(FILES)).env_clear();
    format!("execute {}: {}", program.display(), mkfs.exec())
}

fn prepare(workspace: &Path) -> io::Result<()> {
    fs::create_dir_all(workspace.join(TEMPORARY))?;
    fs::create_dir_all(workspace.join(ROOT))?;
    File::create(workspace.join(PACKED)).map(drop)
}

/// The program's file, without links.
fn find() -> io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin:/usr/sbin:/sbin".into());
    let found = std::env::split_paths(&path).map(|folder| folder.join(PROGRAM)).find(|path| path.is_file());
    found.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?.canonicalize()
}
