//! A container's files: its root filesystem, an overlay of the image below a
//! writable layer of its own, and the bundle that runc reads.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use husk_proto::agent::{ImageVolume, Rootfs};
use nix::fcntl::OFlag;
use nix::mount::MsFlags;
use oci_spec::runtime::Spec;

use crate::disks::Disks;
use crate::idmap::{self, Mapped};
use crate::images::{self, Image, Images};
use crate::mode::{self, Mode};
use crate::{fd, layer, mounts, userns};

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
    /// An image that is a volume.
    #[error("image volume at {destination}: {cause}")]
    Volume {
        /// Where it should be in the container.
        destination: String,
        /// Why it cannot.
        cause: images::Error,
    },
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
    volumes: Vec<Volume>,
    mapped: Mapped,
    mounted: AtomicBool,
}

/// An image that is a volume of the container.
struct Volume {
    destination: PathBuf,
    image: Image,
    sub_path: PathBuf,
    /// Where it is mounted as the pod's user namespace sees it, if there is one.
    mapped: Option<PathBuf>,
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
        volumes: &[ImageVolume],
    ) -> Result<Self, Error> {
        let image = images.mount(disks, rootfs).await?;
        let mut bundle = Self {
            path: mode::at(BUNDLES).join(id),
            layer: layers().join(id),
            image,
            volumes: Vec::new(),
            mapped: Mapped::of(id),
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
                let lower = bundle.mapped_image();
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
        for volume in volumes {
            bundle.add_volume(volume, images, disks, mapped_root.is_some()).await?;
        }
        Ok(bundle)
    }

    async fn add_volume(
        &mut self,
        volume: &ImageVolume,
        images: &Arc<Images>,
        disks: &Disks,
        map_users: bool,
    ) -> Result<(), Error> {
        let image = images
            .mount(disks, &volume.image.clone().unwrap_or_default())
            .await
            .map_err(|cause| Error::Volume { destination: volume.destination.clone(), cause })?;
        let mapped = map_users.then(|| self.path.join(format!("volume-{}", self.volumes.len())));
        if let Some(mapped) = &mapped {
            fs::create_dir_all(mapped).map_err(files("make directory", mapped))?;
            userns::mount_mapped(image.path(), mapped).map_err(files("map the users of", mapped))?;
        }
        let (destination, sub_path) = (volume.destination.clone().into(), volume.sub_path.clone().into());
        self.volumes.push(Volume { destination, image, sub_path, mapped });
        Ok(())
    }

    /// Destinations of the images that are volumes, and where they are.
    pub fn volumes(&self) -> Result<Vec<(PathBuf, PathBuf)>, Error> {
        let source = |volume: &Volume| {
            let root = volume.mapped.as_deref().unwrap_or_else(|| volume.image.path());
            let source =
                beneath(root, &volume.sub_path).map_err(files("find in the image", &volume.sub_path))?;
            Ok((volume.destination.clone(), source))
        };
        self.volumes.iter().map(source).collect()
    }

    /// Mounts the volumes of a configuration that are to be seen with the ids of
    /// the pod's user namespace, and has it lead to them.
    pub async fn map_ids(&mut self, spec: &mut Spec) -> Result<(), idmap::Error> {
        self.mapped.map(spec).await
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
    fn mapped_image(&self) -> PathBuf {
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

    /// Writes it. It may say what is told to the container in secret.
    pub fn write_config(&self, json: &[u8]) -> io::Result<()> {
        let mut file =
            fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(self.config())?;
        file.write_all(json)
    }

    /// Unmounts and deletes everything. May be repeated after a failure.
    pub async fn remove(&self) -> Result<(), Error> {
        let rootfs = self.rootfs();
        mounts::when_idle(|| mounts::unmount(&rootfs)).await?;
        let mapped = self.mapped_image();
        mounts::when_idle(|| mounts::unmount(&mapped)).await?;
        self.mapped.remove().map_err(files("unmount volumes in", self.mapped.folder()))?;
        for volume in &self.volumes {
            if let Some(mapped) = &volume.mapped {
                mounts::when_idle(|| mounts::unmount(mapped)).await?;
            }
            volume.image.release().await.map_err(images::Error::Mount)?;
        }
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
            mounts::detach(&self.mapped_image());
            if let Err(error) = self.mapped.remove() {
                tracing::warn!("unmount volumes in {}: {error}", self.mapped.folder().display());
            }
            self.volumes.iter().filter_map(|volume| volume.mapped.as_deref()).for_each(mounts::detach);
            for tree in [&self.path, &self.layer] {
                if let Err(error) = layer::remove(tree) {
                    tracing::warn!("remove {}: {error}", tree.display());
                }
            }
        }
    }
}

/// The file or directory of an image that never changes.
fn beneath(root: &Path, sub_path: &Path) -> io::Result<PathBuf> {
    if sub_path.as_os_str().is_empty() {
        return Ok(root.to_owned());
    }
    let directory = fs::File::open(root)?;
    let found = fd::open_in_root(&directory, sub_path, OFlag::O_PATH)?;
    fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

fn files(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::Files { doing, path, cause }
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
        let found = |path: &str| beneath(&root, Path::new(path)).map_err(|error| error.kind());
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
