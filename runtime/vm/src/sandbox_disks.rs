//! The sandbox disk: one sparse file per pod, with an ext4 file system for the
//! writable layers of its containers.
//!
//! The file system is made once for each size and copied, holes and all: a copy writes a few
//! hundred KiB. There is no journal, because nothing on the disk outlives its VM.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_base::{blocking, crash, dirs};
use husk_spawn::helper;
use tokio::process::Command;

/// The longest time that making the file system may take.
const MKFS_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of the disk for each inode, as mke2fs(8) has it for most disks: trees of
/// small files (`node_modules`, a package manager's cache) must not run out of
/// inodes long before the disk is full. Inodes that nobody uses take no space.
const BYTES_PER_INODE: u64 = 16384;

/// The prepared file systems, one for each size.
#[derive(Debug)]
pub struct SandboxDisks {
    directory: PathBuf,
    making: tokio::sync::Mutex<()>,
}

/// A sandbox disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the disk.
    #[error("sandbox disk: {stage} {path}: {cause}")]
    File {
        /// The step that failed.
        stage: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        cause: io::Error,
    },
    /// `mke2fs` failed.
    #[error("sandbox disk: mke2fs: {0} (it is in Debian's package e2fsprogs)")]
    Mkfs(String),
}

impl SandboxDisks {
    /// Keeps prepared file systems in `directory`.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, making: tokio::sync::Mutex::default() }
    }

    /// Makes a disk of `mib` MiB at `path`.
    ///
    /// # Errors
    /// The step that failed; nothing is left at `path`.
    pub async fn create(&self, path: &Path, mib: u64) -> Result<(), Error> {
        let prepared = self.prepared(mib).await?;
        crash::point("disk to be copied");
        let to = path.to_owned();
        blocking(move || {
            copy_sparse(&prepared, &to).map_err(|cause| Error::File { stage: "copy to", path: to, cause })
        })
        .await
    }

    /// The prepared file system of `mib` MiB, made if it is not there.
    ///
    /// # Errors
    /// The step that failed; nothing is left behind.
    pub async fn prepared(&self, mib: u64) -> Result<PathBuf, Error> {
        let path = self.directory.join(format!("{mib}-{BYTES_PER_INODE}.ext4"));
        let _making = self.making.lock().await;
        if tokio::fs::try_exists(&path).await.unwrap_or(false) {
            return Ok(path);
        }
        let file = |stage, path: &Path| {
            let path = path.to_owned();
            move |cause| Error::File { stage, path, cause }
        };
        tokio::fs::create_dir_all(&self.directory).await.map_err(file("make folder", &self.directory))?;
        let new = path.with_extension("new");
        let disk = tokio::fs::File::create(&new).await.map_err(file("make", &new))?;
        disk.set_len(mib * 1024 * 1024).await.map_err(file("make", &new))?;
        let mut mkfs = Command::from(helper("mke2fs"));
        mkfs.args(["-q", "-F", "-t", "ext4", "-m", "0", "-i", &BYTES_PER_INODE.to_string()])
            .args(["-O", "^has_journal,^resize_inode"])
            // The new file is one hole, which reads as zeros: neither mke2fs nor the guest
            // has to write zeros.
            .args(["-E", "assume_storage_prezeroed=1,nodiscard,root_owner=0:0"])
            .arg(&new)
            .kill_on_drop(true);
        let output = tokio::time::timeout(MKFS_TIMEOUT, mkfs.output())
            .await
            .map_err(|_| Error::Mkfs(format!("not done within {} s", MKFS_TIMEOUT.as_secs())))?
            .map_err(|error| Error::Mkfs(error.to_string()))?;
        if !output.status.success() {
            let _ = tokio::fs::remove_file(&new).await;
            return Err(Error::Mkfs(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        crash::point("file system of disks made");
        tokio::fs::rename(&new, &path).await.map_err(file("rename to", &path))?;
        Ok(path)
    }
}

/// The most that a guest can have on its sandbox disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskBounds {
    /// Bytes of the disk that are on the host, and those that may still wait in guest memory.
    pub bytes: u64,
    /// Inodes of its filesystem.
    pub inodes: u64,
}

/// The bounds of the disk at `path`. They come from the file on the host, of which
/// the guest can write the content and nothing else. A guest writes to its disk
/// half a minute late: until then the data is in its `memory`, bytes. Without that
/// figure, the size of the disk is the bound. The call blocks.
///
/// # Errors
/// The file system's.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
pub fn disk_bounds(path: &Path, memory: Option<u64>) -> io::Result<DiskBounds> {
    let file = std::fs::metadata(path)?;
    // The unit of `st_blocks` is 512 bytes on every file system (stat(2)).
    let on_host = file.blocks().saturating_mul(512);
    let bytes = memory.map_or(u64::MAX, |memory| on_host.saturating_add(memory)).min(file.len());
    Ok(DiskBounds { bytes, inodes: file.len() / BYTES_PER_INODE })
}

/// Copies what the file holds, and leaves its holes holes. After an error nothing is left
/// at `to`. The call blocks.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    copy_data(from, to).inspect_err(|_| {
        let _ = std::fs::remove_file(to);
    })
}

#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn copy_data(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = dirs::private_file(to)?;
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut buffer = vec![0u8; 64 * 1024];
    let mut position = 0u64;
    while let Some(start) = seek(&source, position, libc::SEEK_DATA)? {
        let end = seek(&source, start, libc::SEEK_HOLE)?.unwrap_or(length);
        position = start;
        while position < end {
            let part = usize::try_from(end - position).unwrap_or(usize::MAX).min(buffer.len());
            let part = buffer.get_mut(..part).unwrap_or_default();
            source.read_exact_at(part, position)?;
            target.write_all_at(part, position)?;
            position += part.len() as u64;
        }
    }
    Ok(())
}

/// The next data or hole at or after `offset`; `None` past the last data.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: lseek touches no memory of ours.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_same_bytes_and_the_same_holes() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        let source = File::create(&from).unwrap();
        source.set_len(64 << 20).unwrap();
        source.write_all_at(b"early", 4096).unwrap();
        source.write_all_at(&[7u8; 100_000], 32 << 20).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }

    #[tokio::test]
    async fn a_disk_is_sparse_and_every_pod_has_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let disks = SandboxDisks::new(folder.path().join("prepared"));
        for name in ["one", "two"] {
            let path = folder.path().join(name);
            disks.create(&path, 1024).await.unwrap();
            let metadata = std::fs::metadata(&path).unwrap();
            assert_eq!(metadata.len(), 1 << 30);
            assert!(metadata.blocks() * 512 < 4 << 20, "{} KiB are taken", metadata.blocks() / 2);
            let mut magic = [0u8; 2];
            File::open(&path).unwrap().read_exact_at(&mut magic, 1024 + 56).unwrap();
            assert_eq!(magic, [0x53, 0xef], "an ext4 superblock");
            let mut inodes = [0u8; 4];
            File::open(&path).unwrap().read_exact_at(&mut inodes, 1024).unwrap();
            assert_eq!(u32::from_le_bytes(inodes), (1 << 30) / 16384);
            let on_host = metadata.blocks() * 512;
            for (memory, bytes) in
                [(Some(1 << 20), on_host + (1 << 20)), (Some(u64::MAX), 1 << 30), (None, 1 << 30)]
            {
                assert_eq!(disk_bounds(&path, memory).unwrap(), DiskBounds { bytes, inodes: 65_536 });
            }
        }
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_written_is_named() {
        let disks = SandboxDisks::new("/proc/husk".into());
        let error = disks.create(Path::new("/proc/husk/disk"), 64).await.unwrap_err();
        assert!(error.to_string().contains("/proc/husk"), "{error}");
    }
}
