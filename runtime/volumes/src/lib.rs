//! Volumes: directories and files of the host, and images, in a pod's containers.
//!
//! Each pod has one directory on the host ([`SharedDir`]) that its file server
//! serves to its VM. A volume is mounted below it under a name of its own, and
//! the container's OCI configuration mounts that name from the guest's side of the directory.
//! Two containers with the same volume use the same mount. A volume that changes
//! under its containers is copied into the guest instead, see [`synced`].
//!
//! A volume is in its container's record before it is mounted, and one that no
//! record of the pod names any more is unmounted. No code here ever removes a
//! directory with its content, which can be the files of others.

pub mod image;
mod read;
mod shared_dir;
pub mod synced;
mod volume;
mod watch;

pub use image::{ImageVolume, is_image};
pub use shared_dir::SharedDir;
pub use volume::{Error, Mode, Prepared, Source, TRUSTED, Volume, clean, options, prepare};
