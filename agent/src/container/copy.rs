//! Copies of an image's directories, with owners, modes and times; links stay
//! links and lead nowhere here. An image never changes, so what was looked at
//! stays what it is. Extended attributes stay behind.

use std::collections::HashMap;
use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;

/// What could not be copied, and why.
#[derive(Debug, thiserror::Error)]
#[error("copy {path}: {cause}")]
pub struct Error {
    path: PathBuf,
    cause: io::Error,
}

/// Fills the directory `to` with what is in the directory `from`, and gives it
/// that one's owner and mode. Blocks: not for the event loop.
pub fn directory(from: &Path, to: &Path) -> Result<(), Error> {
    let mut directories = vec![(from.to_owned(), to.to_owned())];
    let mut linked = HashMap::new();
    let mut next = 0;
    while let Some((from, to)) = directories.get(next).cloned() {
        next += 1;
        let failed = |cause| Error { path: from.clone(), cause };
        for entry in fs::read_dir(&from).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            let copied = entry.metadata().and_then(|metadata| {
                if metadata.is_dir() {
                    fs::create_dir(&to)?;
                    directories.push((from.clone(), to));
                    return Ok(());
                }
                copy(&from, &to, &metadata, &mut linked)
            });
            copied.map_err(|cause| Error { path: from, cause })?;
        }
    }
    // The innermost first: what is made in a directory changes its times.
    for (from, to) in directories.into_iter().rev() {
        let dressed = from.metadata().and_then(|metadata| dress(&to, &metadata));
        dressed.map_err(|cause| Error { path: from, cause })?;
    }
    Ok(())
}

/// Copies what is no directory. `linked` has the files that have several names.
fn copy(from: &Path, to: &Path, metadata: &Metadata, linked: &mut HashMap<u64, PathBuf>) -> io::Result<()> {
    if metadata.nlink() > 1 {
        if let Some(first) = linked.get(&metadata.ino()) {
            return fs::hard_link(first, to);
        }
        linked.insert(metadata.ino(), to.to_owned());
    }
    let kind = metadata.file_type();
    if kind.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
    } else if kind.is_file() {
        fs::copy(from, to)?;
    } else {
        let kind = SFlag::from_bits_truncate(metadata.mode()) & SFlag::S_IFMT;
        mknod(to, kind, Mode::S_IRUSR, metadata.rdev())?;
    }
    dress(to, metadata)
}

/// Owner before mode: a change of the owner takes set-id bits away.
fn dress(path: &Path, like: &Metadata) -> io::Result<()> {
    lchown(path, Some(like.uid()), Some(like.gid()))?;
    if !like.is_symlink() {
        fs::set_permissions(path, Permissions::from_mode(like.mode() & 0o7777))?;
    }
    let accessed = TimeSpec::new(like.atime(), like.atime_nsec());
    let modified = TimeSpec::new(like.mtime(), like.mtime_nsec());
    utimensat(AT_FDCWD, path, &accessed, &modified, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_copy_is_like_what_it_is_of() {
        let parent = tempfile::tempdir().unwrap();
        let (from, to) = (parent.path().join("from"), parent.path().join("to"));
        fs::create_dir_all(from.join("inner/deep")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("inner/file"), "of the image").unwrap();
        fs::hard_link(from.join("inner/file"), from.join("again")).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        nix::unistd::mkfifo(&from.join("pipe"), Mode::S_IRWXU).unwrap();
        let modes = [("inner/file", 0o4750), ("inner", 0o1700), (".", 0o2755), ("pipe", 0o620)];
        for (path, mode) in modes {
            fs::set_permissions(from.join(path), Permissions::from_mode(mode)).unwrap();
        }
        let long_ago = TimeSpec::new(1000, 7);
        for path in ["inner", ".", "inner/file"] {
            utimensat(AT_FDCWD, &from.join(path), &long_ago, &long_ago, UtimensatFlags::NoFollowSymlink)
                .unwrap();
        }

        directory(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("inner/file")).unwrap(), "of the image");
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert!(to.join("inner/deep").is_dir());
        let told = |path: &Path| {
            let it = path.symlink_metadata().unwrap();
            (it.mode(), it.uid(), it.gid(), it.nlink(), it.mtime(), it.mtime_nsec())
        };
        for path in ["inner", ".", "inner/file", "again", "pipe", "link"] {
            assert_eq!(told(&to.join(path)), told(&from.join(path)), "{path}");
        }
        let inode = |path: &str| to.join(path).metadata().unwrap().ino();
        assert_eq!(inode("again"), inode("inner/file"));
        assert_ne!(inode("again"), from.join("again").metadata().unwrap().ino());
    }

    #[test]
    fn what_cannot_be_copied_is_named() {
        let parent = tempfile::tempdir().unwrap();
        let error = directory(&parent.path().join("none"), parent.path()).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }
}
