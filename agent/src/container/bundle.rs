//! A container's files: its root filesystem, which is an overlay of the image
//! and a writable layer of its own, and the bundle that runc reads.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use husk_proto::agent::{ImageVolume, Rootfs, paths};
use nix::mount::MsFlags;
use oci_spec::runtime::Spec;

use crate::container::idmap::{self, Mapped};
use crate::container::images::{self, Image, Images};
use crate::container::{copy, layer};
use crate::guest::disks::Disks;
use crate::guest::mode::Mode;
use crate::guest::{in_root, mounts};
use crate::pod::userns;

const BUNDLES: &str = "/run/husk/bundles";

/// The mount point of a machine's scratch disk.
pub const SCRATCH: &str = "/run/husk/scratch";

/// The directory of the containers' writable layers.
fn layers(mode: &Mode) -> PathBuf {
    match mode {
        Mode::Guest => Path::new(SCRATCH).join("containers"),
        Mode::Host(host) => host.layers.clone(),
    }
}

/// A bundle could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image could not be mounted.
    #[error("image: {0}")]
    Image(#[from] images::Error),
    /// The overlay could not be mounted.
    #[error("root filesystem: {0}")]
    Rootfs(#[from] mounts::Error),
    /// An image that is a volume could not be mounted.
    #[error("image volume at {destination}: {cause}")]
    Volume {
        /// The mount point in the container.
        destination: String,
        cause: images::Error,
    },
    /// A directory that the image declares as a volume could not be copied.
    #[error("fill the image's volume at {destination}: {cause}")]
    Copy {
        /// The path in the container.
        destination: PathBuf,
        cause: copy::Error,
    },
    /// A directory or file could not be made or removed.
    #[error("{doing} {path}: {cause}")]
    Files { doing: &'static str, path: PathBuf, cause: io::Error },
}

/// The sources of a container's files.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The place of the agent: machine or host.
    pub mode: &'a Mode,
    /// The pod's images.
    pub images: &'a Arc<Images>,
    /// The machine's disks.
    pub disks: &'a Disks,
    /// The machine's user and group for root in the container, who own its
    /// files; `None` in a pod without a user namespace.
    pub mapped_root: Option<(u32, u32)>,
}

/// A container's files. Dropping it without [`Self::remove`] unmounts them as
/// far as possible.
pub struct Bundle {
    path: PathBuf,
    layer: PathBuf,
    image: Image,
    volumes: Vec<Volume>,
    /// The paths of the container's own directories.
    directories: Vec<PathBuf>,
    mapped: Mapped,
    mounted: AtomicBool,
}

/// An image that is a volume of the container.
struct Volume {
    destination: PathBuf,
    image: Image,
    sub_path: PathBuf,
    /// The mount of the image with the ids of the pod's user namespace, if there
    /// is one.
    mapped: Option<PathBuf>,
}

impl Bundle {
    /// Mounts the root filesystem of container `id`.
    pub async fn prepare(
        id: &str,
        rootfs: &Rootfs,
        volumes: &[ImageVolume],
        sources: Sources<'_>,
    ) -> Result<Self, Error> {
        let Sources { mode, images, disks, mapped_root } = sources;
        let image = images.mount(disks, rootfs).await?;
        let mut bundle = Self {
            path: mode.at(BUNDLES).join(id),
            layer: layers(mode).join(id),
            image,
            volumes: Vec::new(),
            directories: Vec::new(),
            mapped: Mapped::of(id, mode),
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
                userns::mount_mapped(bundle.image.path(), &lower, &mode.at(paths::USER_NAMESPACE))
                    .map_err(files("map the users of", &lower))?;
                lower
            }
        };
        let options = overlay_options(&lower, &bundle.upper(), &bundle.layer.join("work"));
        mounts::mount("overlay", bundle.rootfs(), "overlay", MsFlags::MS_NOATIME, &options)?;
        for volume in volumes {
            bundle.add_volume(volume, sources).await?;
        }
        Ok(bundle)
    }

    async fn add_volume(&mut self, volume: &ImageVolume, sources: Sources<'_>) -> Result<(), Error> {
        let image = sources
            .images
            .mount(sources.disks, &volume.image.clone().unwrap_or_default())
            .await
            .map_err(|cause| Error::Volume { destination: volume.destination.clone(), cause })?;
        let mapped = sources.mapped_root.map(|_| self.path.join(format!("volume-{}", self.volumes.len())));
        if let Some(mapped) = &mapped {
            fs::create_dir_all(mapped).map_err(files("make directory", mapped))?;
            let namespace = sources.mode.at(paths::USER_NAMESPACE);
            userns::mount_mapped(image.path(), mapped, &namespace)
                .map_err(files("map the users of", mapped))?;
        }
        let (destination, sub_path) = (volume.destination.clone().into(), volume.sub_path.clone().into());
        self.volumes.push(Volume { destination, image, sub_path, mapped });
        Ok(())
    }

    /// Makes the directories that the image declares as volumes. They are
    /// beside the writable layer, begin with the image's content, and are
    /// mounted where the pod's users can reach them too.
    pub async fn add_directories(
        &mut self,
        destinations: Vec<PathBuf>,
        mapped_root: Option<(u32, u32)>,
    ) -> Result<(), Error> {
        let (user, group) = mapped_root.unwrap_or_default();
        for destination in destinations {
            let number = self.directories.len();
            let (place, point) = (self.layer.join(format!("volume-{number}")), self.directory(number));
            for directory in [&place, &point] {
                fs::create_dir(directory).map_err(files("make directory", directory))?;
            }
            std::os::unix::fs::chown(&place, Some(user), Some(group)).map_err(files("give away", &place))?;
            // The container has not written yet, so this is the image's
            // content.
            let below = destination.strip_prefix("/").unwrap_or(&destination);
            match in_root::find(&self.rootfs(), below) {
                Ok(from) => {
                    let to = place.clone();
                    let copied = tokio::task::spawn_blocking(move || copy::directory(&from, &to)).await;
                    copied
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
                        .map_err(|cause| Error::Copy { destination: destination.clone(), cause })?;
                }
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
                Err(cause) => return Err(files("find in the image", &destination)(cause)),
            }
            self.directories.push(destination);
            let bind = MsFlags::MS_BIND;
            mounts::mount(&place.to_string_lossy(), &point, "none", bind, "")?;
        }
        Ok(())
    }

    /// The mount point of one of the container's own directories.
    fn directory(&self, number: usize) -> PathBuf {
        self.path.join(format!("directory-{number}"))
    }

    /// The destinations of image volumes and of the container's own
    /// directories, with their sources.
    pub fn volumes(&self) -> Result<Vec<(PathBuf, PathBuf)>, Error> {
        let source = |volume: &Volume| {
            let root = volume.mapped.as_deref().unwrap_or_else(|| volume.image.path());
            let source = in_root::find(root, &volume.sub_path)
                .map_err(files("find in the image", &volume.sub_path))?;
            Ok((volume.destination.clone(), source))
        };
        let own = self.directories.iter().enumerate();
        let own = own.map(|(number, destination)| Ok((destination.clone(), self.directory(number))));
        self.volumes.iter().map(source).chain(own).collect()
    }

    /// Mounts the volumes of a configuration that need the ids of the pod's user
    /// namespace, and changes the configuration to use these mounts.
    pub async fn map_ids(&mut self, spec: &mut Spec) -> Result<(), idmap::Error> {
        self.mapped.map(spec).await
    }

    /// The bundle, a directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The container's root filesystem.
    pub fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    /// The mount of the image with the ids of the pod's user namespace.
    fn mapped_image(&self) -> PathBuf {
        self.path.join("image")
    }

    /// The writable layer.
    pub fn upper(&self) -> PathBuf {
        self.layer.join("upper")
    }

    /// The container's OCI configuration.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// Writes the configuration, which may have secrets in its environment.
    pub fn write_config(&self, json: &[u8]) -> io::Result<()> {
        let mut file =
            fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(self.config())?;
        file.write_all(json)
    }

    /// Unmounts and deletes everything. Can be repeated after a failure.
    pub async fn remove(&self) -> Result<(), Error> {
        let rootfs = self.rootfs();
        mounts::when_idle(|| mounts::unmount(&rootfs)).await?;
        let mapped = self.mapped_image();
        mounts::when_idle(|| mounts::unmount(&mapped)).await?;
        self.mapped.remove().map_err(files("unmount volumes in", self.mapped.folder()))?;
        for number in 0..self.directories.len() {
            let point = self.directory(number);
            mounts::when_idle(|| mounts::unmount(&point)).await?;
        }
        for volume in &self.volumes {
            if let Some(mapped) = &volume.mapped {
                mounts::when_idle(|| mounts::unmount(mapped)).await?;
            }
            volume.image.release().await.map_err(images::Error::Mount)?;
        }
        self.image.release().await.map_err(images::Error::Mount)?;
        self.mounted.store(false, Ordering::Relaxed);
        layer::remove(&self.path).map_err(files("remove", &self.path))?;
        // Deleting takes long if the container has written much.
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
                tracing::warn!(path = %self.mapped.folder().display(), %error, "failed to unmount volumes");
            }
            self.volumes.iter().filter_map(|volume| volume.mapped.as_deref()).for_each(mounts::detach);
            (0..self.directories.len()).for_each(|number| mounts::detach(&self.directory(number)));
            for tree in [&self.path, &self.layer] {
                if let Err(error) = layer::remove(tree) {
                    tracing::warn!(path = %tree.display(), %error, "failed to remove files of a container");
                }
            }
        }
    }
}

/// The options with which a writable layer is mounted over an image (Linux
/// `Documentation/filesystems/overlayfs.rst`).
///
/// - `volatile`: the layer is removed with its container, so nothing in it need
///   survive a crash of the machine.
/// - `xino=on`: all files have one device number, and keep their inode number
///   when they are first written to. Otherwise programs that stay on one file
///   system (`du -x`, `find -xdev`, `rsync -x`) would see many.
fn overlay_options(lower: &Path, upper: &Path, work: &Path) -> String {
    format!(
        "lowerdir={},upperdir={},workdir={},volatile,xino=on",
        lower.display(),
        upper.display(),
        work.display()
    )
}

fn files(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::Files { doing, path, cause }
}
