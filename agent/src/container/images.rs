//! Image filesystems. Each is mounted once, read-only, for all containers of
//! the pod that use it, and unmounted with the last of them, so that the host
//! can detach its disk.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_proto::agent::Rootfs;
use nix::mount::MsFlags;

use crate::guest::disks::{self, Disks};
use crate::guest::loops::Loop;
use crate::guest::mode::Mode;
use crate::guest::mounts;

const IMAGES: &str = "/run/husk/images";

/// An image could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image's disk is missing.
    #[error(transparent)]
    Disk(#[from] disks::Error),
    /// The image's file could not be attached to a loop device.
    #[error("put {path} behind a loop device: {cause}")]
    Loop { path: PathBuf, cause: io::Error },
    /// The filesystem could not be mounted.
    #[error(transparent)]
    Mount(#[from] mounts::Error),
}

/// The mounted images, and how many containers use each. An unused image is in
/// here only while it is being unmounted.
#[derive(Default)]
pub struct Images {
    mode: Arc<Mode>,
    users: Mutex<HashMap<String, usize>>,
}

impl Images {
    /// No images yet.
    pub fn new(mode: Arc<Mode>) -> Self {
        Self { mode, users: Mutex::default() }
    }

    /// Mounts the image on the disk with this serial number or, on the host, in
    /// this file, unless it is mounted.
    pub async fn mount(self: &Arc<Self>, disks: &Disks, rootfs: &Rootfs) -> Result<Image, Error> {
        let serial = rootfs.image_serial.as_str();
        let disk = match *self.mode {
            Mode::Guest => Some(disks.wait_for(serial).await?),
            Mode::Host(_) => None,
        };
        let path = self.mode.at(IMAGES).join(serial);
        let mut users = self.users();
        let count = match users.get(serial) {
            Some(count) => *count,
            None => {
                mounts::make_mount_point(&path)?;
                let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
                let mount =
                    |device: &Path| mounts::mount(&device.to_string_lossy(), &path, "erofs", flags, "");
                match disk {
                    Some(disk) => mount(&disk)?,
                    // The mount keeps the loop device.
                    None => mount(attach(Path::new(&rootfs.image_file))?.path())?,
                }
                0
            }
        };
        users.insert(serial.to_owned(), count + 1);
        Ok(Image { images: self.clone(), serial: serial.to_owned(), path, held: AtomicBool::new(true) })
    }

    fn users(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn let_go(&self, serial: &str) {
        if let Some(count) = self.users().get_mut(serial) {
            *count = count.saturating_sub(1);
        }
    }

    /// Runs `unmount` if the image has no users. The table is locked meanwhile:
    /// a new user comes either before that, and keeps the mount, or after it,
    /// and makes its own.
    fn if_unused(
        &self,
        serial: &str,
        unmount: impl FnOnce() -> Result<(), mounts::Error>,
    ) -> Result<(), mounts::Error> {
        let mut users = self.users();
        if users.get(serial) == Some(&0) {
            unmount()?;
            users.remove(serial);
        }
        Ok(())
    }
}

fn attach(file: &Path) -> Result<Loop, Error> {
    Loop::attach(file).map_err(|cause| Error::Loop { path: file.to_owned(), cause })
}

/// One container's use of an image.
pub struct Image {
    images: Arc<Images>,
    serial: String,
    path: PathBuf,
    held: AtomicBool,
}

impl Image {
    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the use of the image, and unmounts it with its last use. Can be
    /// repeated after a failure.
    pub async fn release(&self) -> Result<(), mounts::Error> {
        if self.held.swap(false, Ordering::Relaxed) {
            self.images.let_go(&self.serial);
        }
        mounts::when_idle(|| self.images.if_unused(&self.serial, || mounts::unmount(&self.path))).await
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if *self.held.get_mut() {
            self.images.let_go(&self.serial);
            let _ = self.images.if_unused(&self.serial, || {
                mounts::detach(&self.path);
                Ok(())
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn only_the_last_user_unmounts() {
        let images = Images::default();
        images.users().insert("a".into(), 2);
        let unmounted = Cell::new(0);
        for expected in [0, 1, 1] {
            images.let_go("a");
            images
                .if_unused("a", || {
                    unmounted.set(unmounted.get() + 1);
                    Ok(())
                })
                .unwrap();
            assert_eq!(unmounted.get(), expected);
        }
        assert!(images.users().is_empty());
    }
}
