//! Files below a root directory that is not trusted, such as an image's.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// Opens `path` as a process whose root directory is `root` would: links are
/// followed, but never out of the root.
pub fn open(root: impl AsFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// The real path of a file or directory below a root that never changes. Links
/// are followed as in [`open`].
pub fn find(root: &Path, path: &Path) -> io::Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Ok(root.to_owned());
    }
    let found = open(File::open(root)?, path, OFlag::O_PATH)?;
    fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_of_an_image_do_not_lead_out_of_it() {
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("image");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/passwd"), "").unwrap();
        fs::write(parent.path().join("secret"), "").unwrap();
        for (link, to) in
            [("absolute", "/etc"), ("up", "../secret"), ("good", "etc/passwd"), ("far", "../../../../etc")]
        {
            symlink(to, root.join(link)).unwrap();
        }
        let found = |path: &str| find(&root, Path::new(path)).map_err(|error| error.kind());
        assert_eq!(found(""), Ok(root.clone()));
        assert_eq!(found("etc"), Ok(root.join("etc")));
        assert_eq!(found("absolute/passwd"), Ok(root.join("etc/passwd")));
        assert_eq!(found("good"), Ok(root.join("etc/passwd")));
        assert_eq!(found("far"), Ok(root.join("etc")));
        assert_eq!(found("up"), Err(io::ErrorKind::NotFound));
        assert_eq!(found("../secret"), Err(io::ErrorKind::NotFound));
        assert_eq!(found("missing"), Err(io::ErrorKind::NotFound));
    }
}
