//! Copies of an image's directories, with owners, modes, times and extended
//! attributes (which include file capabilities and access control lists).
//! Symbolic links are copied as links and never followed. An image never
//! changes, so nothing changes between a check and its use.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;
use rustix::fs::{XattrFlags, lgetxattr, lgetxattr_query, llistxattr, llistxattr_query, lsetxattr};
use rustix::io::Errno;

/// A file could not be copied.
#[derive(Debug, thiserror::Error)]
#[error("copy {path}: {cause}")]
pub struct Error {
    path: PathBuf,
    cause: io::Error,
}

/// Copies the content of the directory `from` into the directory `to`, and
/// gives `to` the owner and mode of `from`. Blocks: not for the event loop.
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
    // The innermost directories come first, because making a file changes the
    // times of its directory.
    for (from, to) in directories.into_iter().rev() {
        let copy_metadataed = from.metadata().and_then(|metadata| copy_metadata(&to, &from, &metadata));
        copy_metadataed.map_err(|cause| Error { path: from, cause })?;
    }
    Ok(())
}

/// Copies a file that is not a directory. `linked` holds the files that have
/// several names.
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
    copy_metadata(to, from, metadata)
}

/// Copies extended attributes, as far as the file system of `to` supports them.
fn copy_xattrs(from: &Path, to: &Path) -> io::Result<()> {
    let length = match llistxattr_query(from) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(()),
        length => length?,
    };
    let mut names = vec![0; length];
    let length = llistxattr(from, &mut names[..])?;
    names.truncate(length);
    for name in names.split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
        match lsetxattr(to, name, &xattr(from, name)?, XattrFlags::empty()) {
            Err(Errno::NOTSUP) => {}
            other => other?,
        }
    }
    Ok(())
}

/// The value of an extended attribute.
fn xattr(path: &Path, name: &CStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0; lgetxattr_query(path, name)?];
    let length = lgetxattr(path, name, &mut value[..])?;
    value.truncate(length);
    Ok(value)
}

/// Gives a copy the metadata of its original. The owner comes first, because
/// changing it clears set-ID bits and capabilities.
fn copy_metadata(path: &Path, from: &Path, like: &Metadata) -> io::Result<()> {
    lchown(path, Some(like.uid()), Some(like.gid()))?;
    if !like.is_symlink() {
        fs::set_permissions(path, Permissions::from_mode(like.mode() & 0o7777))?;
    }
    copy_xattrs(from, path)?;
    let accessed = TimeSpec::new(like.atime(), like.atime_nsec());
    let modified = TimeSpec::new(like.mtime(), like.mtime_nsec());
    utimensat(AT_FDCWD, path, &accessed, &modified, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}

#[cfg(test)]
mod tests {
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
    fn a_copy_has_the_extended_attributes_of_its_original() {
        let parent = tempfile::tempdir().unwrap();
        let (from, to) = (parent.path().join("from"), parent.path().join("to"));
        fs::create_dir_all(from.join("inner")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("inner/ping"), "a program").unwrap();
        let mut set =
            vec![("inner", c"user.place", &b"a directory's"[..]), ("inner/ping", c"user.empty", b"")];
        // cap_net_raw+ep, which an ordinary user cannot give (`linux/capability.h`, VFS_CAP_REVISION_2).
        let ping = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        if nix::unistd::geteuid().is_root() {
            set.push(("inner/ping", c"security.capability", &ping));
        }
        for (path, name, value) in &set {
            lsetxattr(from.join(path), *name, value, XattrFlags::empty()).unwrap();
        }

        directory(&from, &to).unwrap();
        for (path, name, value) in set {
            let copied = xattr(&to.join(path), name).unwrap();
            assert_eq!(copied, value, "{name:?} of {path}");
        }
    }

    #[test]
    fn what_cannot_be_copied_is_named() {
        let parent = tempfile::tempdir().unwrap();
        let error = directory(&parent.path().join("none"), parent.path()).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }
}
