//! A container's files: its root filesystem, an overlay of the image below a
//! writable layer of its own, and the bundle that runc reads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use husk_proto::agent::Rootfs;
use nix::mount::MsFlags;

use crate::disks::Disks;
use crate::images::{self, Image, Images};
use crate::mode::{self, Mode};
use crate::{layer, mounts, userns};

const BUNDLES: &str = "/run/husk/bundles";

/// Where a machine's scratch disk is mounted.
pub const SCRATCH: &str = "/run/husk/scratch";

/// Where the writable layers of containers are.
fn layers() -> PathBuf {
    match mode::get() {
        Mode::Guest => Path::new(SCRATCH).join("containers"),
        Mode::Host(host) => host.layers.clone(),
    }
}

/// A bundle could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image below.
    #[error("image: {0}")]
    Image(#[from] images::Error),
    /// The overlay.
    #[error("root filesystem: {0}")]
    Rootfs(#[from] mounts::Error),
    /// Its directories and files.
    #[error("{doing} {path}: {cause}")]
    Files {
        /// What failed.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
}

/// A container's files. Dropping it without [`Self::remove`] takes its mounts
/// away as well as can be.
pub struct Bundle {
    path: PathBuf,
    layer: PathBuf,
    image: Image,
    mounted: AtomicBool,
}

impl Bundle {
    /// Mounts the root filesystem of container `id`. In a pod with a user
    /// namespace its files belong to `mapped_root`, the machine's user and
    /// group for root in the container.
    pub async fn prepare(
        id: &str,
        rootfs: &Rootfs,
        images: &Arc<Images>,
        disks: &Disks,
        mapped_root: Option<(u32, u32)>,
    ) -> Result<Self, Error> {
        let image = images.mount(disks, rootfs).await?;
        let bundle = Self {
            path: mode::at(BUNDLES).join(id),
            layer: layers().join(id),
            image,
            mounted: AtomicBool::new(true),
        };
        for directory in [bundle.rootfs(), bundle.upper(), bundle.layer.join("work")] {
            fs::create_dir_all(&directory).map_err(files("make directory", &directory))?;
        }
        let lower = match mapped_root {
            None => bundle.image.path().to_owned(),
            Some((user, group)) => {
                std::os::unix::fs::chown(bundle.upper(), Some(user), Some(group))
                    .map_err(files("give away", &bundle.upper()))?;
                let lower = bundle.mapped();
                fs::create_dir_all(&lower).map_err(files("make directory", &lower))?;
                userns::mount_mapped(bundle.image.path(), &lower)
                    .map_err(files("map the users of", &lower))?;
                lower
            }
        };
        // The layer goes with its container, so nothing in it need survive a
        // crash of the machine: `volatile` saves the syncs (Linux
        // `Documentation/filesystems/overlayfs.rst`, "Volatile mount").
        let options = format!(
            "lowerdir={},upperdir={},workdir={},volatile",
            lower.display(),
            bundle.upper().display(),
            bundle.layer.join("work").display()
        );
        mounts::mount("overlay", bundle.rootfs(), "overlay", MsFlags::MS_NOATIME, &options)?;
        Ok(bundle)
    }

    /// The directory that runc calls the bundle.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The container's root filesystem.
    pub fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    /// Where the image is mounted as the pod's user namespace sees it.
    fn mapped(&self) -> PathBuf {
        self.path.join("image")
    }

    /// What the container has written.
    pub fn upper(&self) -> PathBuf {
        self.layer.join("upper")
    }

    /// The container's OCI configuration.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// Unmounts and deletes everything. May be repeated after a failure.
    pub async fn remove(&self) -> Result<(), Error> {
        let rootfs = self.rootfs();
        mounts::when_idle(|| mounts::unmount(&rootfs)).await?;
        let mapped = self.mapped();
        mounts::when_idle(|| mounts::unmount(&mapped)).await?;
        self.image.release().await.map_err(images::Error::Mount)?;
        self.mounted.store(false, Ordering::Relaxed);
        layer::remove(&self.path).map_err(files("remove", &self.path))?;
        // What the container wrote may be much.
        let path = self.layer.clone();
        let removed = tokio::task::spawn_blocking(move || layer::remove(&path)).await;
        removed.unwrap_or_else(|panic| Err(io::Error::other(panic))).map_err(files("remove", &self.layer))
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if *self.mounted.get_mut() {
            mounts::detach(&self.rootfs());
            mounts::detach(&self.mapped());
            for tree in [&self.path, &self.layer] {
                if let Err(error) = layer::remove(tree) {
                    tracing::warn!("remove {}: {error}", tree.display());
                }
            }
        }
    }
}

fn files(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::Files { doing, path, cause }
}
