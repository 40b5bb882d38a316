//! Trims the sandbox disk from time to time, as fstrim(8) does. The disk's file on the host is
//! sparse, and so shrinks when a pod deletes files. The mount option `discard` would instead make
//! every deletion of a file wait for the host.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use tokio::time::sleep;

/// How often to check whether there is something to trim.
const PERIOD: Duration = Duration::from_secs(10);

/// Fewest bytes for which trimming is worth it.
const WORTH: u64 = 16 << 20;

/// Bytes of the shortest free range that is trimmed.
const SHORTEST: u64 = 64 << 10;

/// `struct fstrim_range` of `linux/fs.h`.
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
    shortest: u64,
}

nix::ioctl_readwrite!(fitrim, b'X', 121, Range);

/// A mounted file system and its block device.
pub struct Disk {
    mounted: PathBuf,
    /// The file of the device's counters in sysfs.
    counters: PathBuf,
}

/// How many bytes of a disk are used, and how many were ever written to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Level {
    used: u64,
    written: u64,
}

impl Level {
    /// Most bytes that may have been freed between this level and a later one.
    const fn freed_until(self, now: Self) -> u64 {
        let written = now.written.saturating_sub(self.written);
        self.used.saturating_add(written).saturating_sub(now.used)
    }
}

impl Disk {
    /// The file system of `device` (`/dev/vda`), mounted at `mounted`.
    pub fn new(device: &Path, mounted: &Path) -> Self {
        let name = device.file_name().unwrap_or_default();
        Self { mounted: mounted.to_owned(), counters: Path::new("/sys/class/block").join(name).join("stat") }
    }

    /// Trims the file system whenever enough may have been freed, without end.
    pub async fn keep_trimmed(self) {
        let mut trimmed = self.level().unwrap_or_default();
        loop {
            sleep(PERIOD).await;
            let Ok(now) = self.level() else { continue };
            if trimmed.freed_until(now) < WORTH {
                continue;
            }
            trimmed = now;
            let mounted = self.mounted.clone();
            match tokio::task::spawn_blocking(move || trim(&mounted)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return,
                Ok(Err(error)) => {
                    tracing::warn!(path = %self.mounted.display(), %error, "failed to trim a file system")
                }
                Err(_) => return,
            }
        }
    }

    fn level(&self) -> io::Result<Level> {
        let space = statvfs(&self.mounted)?;
        let used = space.blocks().saturating_sub(space.blocks_free()).saturating_mul(space.fragment_size());
        Ok(Level { used, written: written(&fs::read_to_string(&self.counters)?) })
    }
}

/// Bytes written to a block device: the seventh number of its counters, in
/// sectors (Linux `Documentation/block/stat.rst`).
fn written(counters: &str) -> u64 {
    let sectors = counters.split_whitespace().nth(6).and_then(|word| word.parse::<u64>().ok());
    sectors.unwrap_or(0).saturating_mul(512)
}

/// Tells the device below a file system which ranges are free.
fn trim(mounted: &Path) -> io::Result<()> {
    let directory = File::open(mounted)?;
    let mut range = Range { start: 0, length: u64::MAX, shortest: SHORTEST };
    // SAFETY: `range` is laid out as fstrim_range, which the kernel reads and
    // writes during the call.
    unsafe { fitrim(directory.as_raw_fd(), &raw mut range) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_and_is_not_used_has_been_freed() {
        let seen = Level { used: 100, written: 1000 };
        let freed = |used, written| seen.freed_until(Level { used, written });
        assert_eq!(freed(100, 1000), 0);
        assert_eq!(freed(60, 1000), 40, "deleted");
        assert_eq!(freed(150, 1050), 0, "new files");
        assert_eq!(freed(100, 1300), 300, "as much deleted as written");
        assert_eq!(freed(500, 1000), 0, "not written yet");
    }

    #[test]
    fn a_devices_counters_tell_what_was_written() {
        assert_eq!(written("  12 0 96 4  7 3 2048 5 0 9 9 0 0 0 0 0 0\n"), 2048 * 512);
        assert_eq!(written(""), 0);
    }

    #[test]
    fn the_structure_is_the_kernels() {
        assert_eq!(size_of::<Range>(), 24);
    }
}
