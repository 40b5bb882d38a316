//! Images as volumes: their files in a container, read-only.
//!
//! In a VM such an image is a disk like that of a container's own image, and is
//! shared with all containers that are made from it; on the host the pod's
//! supervisor mounts the image's file, once for all containers. The agent looks up the part
//! of the image that is wanted, so that no link in the image leads out of it.

use std::path::{Component, Path, PathBuf};

use husk_proto::cri;
use serde::{Deserialize, Serialize};

/// An image that a container cannot have as a volume.
#[derive(Debug, thiserror::Error)]
#[error("image volume at `{path}`: {problem}")]
pub struct Error {
    /// The place in the container.
    path: String,
    /// The reason for which it cannot be there.
    problem: String,
}

/// An image volume of a container, as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageVolume {
    /// Serial number of the block device that holds the image in the guest.
    pub slot: String,
    /// The file behind that device.
    pub rootfs: PathBuf,
    /// The absolute path in the container.
    pub container_path: PathBuf,
    /// The directory or file of the image that is wanted; empty for the whole image.
    pub sub_path: String,
}

/// Whether a mount is an image.
#[must_use]
pub fn is_image(mount: &cri::Mount) -> bool {
    mount.image.as_ref().is_some_and(|image| !image.image.is_empty())
}

/// The images that a container wants mounted. `rootfs` answers an image's file;
/// the slots are still empty.
///
/// # Errors
/// The first mount that the container cannot have.
pub fn wanted<E: From<Error>>(
    mounts: &[cri::Mount],
    rootfs: impl Fn(&cri::ImageSpec) -> Result<PathBuf, E>,
) -> Result<Vec<ImageVolume>, E> {
    let mut volumes = Vec::new();
    for mount in mounts.iter().filter(|mount| is_image(mount)) {
        let refused =
            |problem: &str| E::from(Error { path: mount.container_path.clone(), problem: problem.into() });
        if !mount.host_path.is_empty() {
            return Err(refused("`host_path` must be empty, or `image` must"));
        }
        if mount.propagation != cri::MountPropagation::PropagationPrivate as i32 {
            return Err(refused("nothing is ever mounted in an image: its propagation must be private"));
        }
        if !mount.mount_options.is_empty() {
            return Err(refused("`mount_options` are not supported"));
        }
        let container_path = crate::volume::clean(&mount.container_path)
            .ok_or_else(|| refused("the path must be absolute"))?;
        let inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
        if !Path::new(&mount.image_sub_path).components().all(inside) {
            return Err(refused("`image_sub_path` must be relative, without `..`"));
        }
        let rootfs = rootfs(&mount.image.clone().unwrap_or_default())?;
        let sub_path = mount.image_sub_path.clone();
        volumes.push(ImageVolume { slot: String::new(), rootfs, container_path, sub_path });
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_images_are_wanted_and_only_from_inside() {
        let plain = cri::Mount { container_path: "/a".into(), host_path: "/b".into(), ..Default::default() };
        let image = cri::Mount {
            container_path: "/data/../models".into(),
            image: Some(cri::ImageSpec { image: "models:1".into(), ..Default::default() }),
            image_sub_path: "small".into(),
            readonly: true,
            ..Default::default()
        };
        let wanted = |mount: &cri::Mount| {
            super::wanted(&[plain.clone(), mount.clone()], |image| {
                Ok::<_, Error>(Path::new("/files").join(&image.image))
            })
        };
        let volume = ImageVolume {
            slot: String::new(),
            rootfs: "/files/models:1".into(),
            container_path: "/models".into(),
            sub_path: "small".into(),
        };
        assert_eq!(wanted(&image).unwrap(), [volume]);
        assert!(wanted(&plain).unwrap().is_empty());
        for (mount, word) in [
            (cri::Mount { host_path: "/x".into(), ..image.clone() }, "host_path"),
            (cri::Mount { container_path: "models".into(), ..image.clone() }, "absolute"),
            (cri::Mount { image_sub_path: "../x".into(), ..image.clone() }, "image_sub_path"),
            (cri::Mount { image_sub_path: "/x".into(), ..image.clone() }, "image_sub_path"),
            (cri::Mount { propagation: 1, ..image.clone() }, "private"),
            (cri::Mount { mount_options: vec!["rw".into()], ..image.clone() }, "mount_options"),
        ] {
            let error = wanted(&mount).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("image volume"), "{error}");
        }
    }
}
