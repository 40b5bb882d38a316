//! Descriptors: pipes and terminals in the event loop, and files of a root that is not trusted.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Opens `path` as a process whose root directory is `root` would: links are
/// followed, but never out of it.
pub fn open_in_root(root: impl AsFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// Where a file or directory of a root that never changes really is, links
/// followed as [`open_in_root`] does.
pub fn find_in_root(root: &Path, path: &Path) -> io::Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Ok(root.to_owned());
    }
    let found = open_in_root(File::open(root)?, path, OFlag::O_PATH)?;
    fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

/// The agent's end of a pipe or terminal, non-blocking.
pub struct AsyncFile(AsyncFd<File>);

impl AsyncFile {
    /// Takes an end that the process never holds: the flag `O_NONBLOCK`
    /// belongs to it, not to this descriptor alone.
    pub fn reader(end: OwnedFd) -> io::Result<Self> {
        Self::new(end, Interest::READABLE)
    }

    /// The same, to write to.
    pub fn writer(end: OwnedFd) -> io::Result<Self> {
        Self::new(end, Interest::WRITABLE)
    }

    fn new(end: OwnedFd, interest: Interest) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&end, FcntlArg::F_GETFL)?);
        fcntl(&end, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: the file owns its descriptor, and neither closes nor
        // replaces it while it is registered.
        let file = unsafe { AsyncFd::register_with_interest(File::from(end), interest) }?;
        Ok(Self(file))
    }

    /// Waits for bytes, at most `limit`, and only then makes room for them: a
    /// stream that is silent holds no buffer. Empty at the end, which a
    /// terminal tells by `EIO` once nobody has its other side open.
    pub async fn read(&self, limit: usize) -> io::Result<Vec<u8>> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut buffer = vec![0; limit];
            match ready.try_io(|file| file.get_ref().read(&mut buffer)) {
                Ok(Ok(count)) => {
                    buffer.truncate(count);
                    return Ok(buffer);
                }
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(Vec::new()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_not_ready) => {}
            }
        }
    }

    /// Writes some of `bytes`.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|file| file.get_ref().write(bytes)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(done) => return done,
                Err(_not_ready) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
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
        let found = |path: &str| find_in_root(&root, Path::new(path)).map_err(|error| error.kind());
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
