//! OCI images: pulled and verified, unpacked, and stored as one EROFS file each.
//!
//! [`ImageStore::pull`] asks a registry (`registry`, or the mirrors that `hosts` names),
//! reads its documents (`document`), has a jailed process unpack the layers ([`unpack`],
//! `layer`, `tree`), and packs the files (`erofs`). A pull works in a folder of its own and
//! becomes visible by one transaction of the `store`. The store removes the leftovers of a
//! crash when it opens.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use husk_base::FileError;
use oci_spec::image::ImageConfiguration;

mod chain;
mod document;
mod erofs;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod gate;
mod hosts;
mod layer;
mod metadata;
mod pull;
mod reference;
mod referral;
mod registry;
mod store;
mod tree;
pub mod unpack;

pub use layer::Limits;
pub use reference::{full_name, is_at};
pub use registry::Credentials;
pub use store::{FsInfo, ImageStore};

/// Most bytes of a file of certificates.
const MAX_PEM: u64 = 4 << 20;

/// The settings of an image store.
#[derive(Clone, Debug)]
pub struct ImageConfig {
    /// Registries that are asked over plain HTTP, besides loopback addresses.
    pub insecure_registries: Vec<String>,
    /// Hosts that registries may send huskd to for tokens, including passwords, and
    /// for content, whatever their addresses are.
    pub trusted_hosts: Vec<String>,
    /// The folder with a `<host>/hosts.toml` for each registry that has mirrors.
    pub hosts_dir: PathBuf,
    /// Most time that may pass without a byte from the registry.
    pub stall_timeout: std::time::Duration,
    /// Most time that a pull may take.
    pub pull_timeout: std::time::Duration,
    /// Limits on the content of an image.
    pub limits: Limits,
    /// Bytes that stay free on the images' disk. A pull that would leave less fails.
    pub min_free: u64,
    /// Most pulls at a time; others wait.
    pub parallel_pulls: usize,
    /// Most images that are unpacked at a time; other pulls wait.
    pub parallel_unpacks: usize,
    /// The program that runs [`unpack::main`]: huskd itself, unless a test says otherwise.
    pub unpacker: PathBuf,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            insecure_registries: Vec::new(),
            trusted_hosts: Vec::new(),
            hosts_dir: "/etc/husk/certs.d".into(),
            stall_timeout: std::time::Duration::from_secs(60),
            pull_timeout: std::time::Duration::from_secs(900),
            limits: Limits::default(),
            min_free: 256 << 20,
            parallel_pulls: 8,
            parallel_unpacks: 2,
            unpacker: "/proc/self/exe".into(),
        }
    }
}

/// An image of the store. It is cheap to clone.
#[derive(Clone, Debug)]
pub struct Image {
    /// The digest of the image's configuration, "sha256:…".
    pub id: Arc<str>,
    /// The tags of the image, "docker.io/library/nginx:1".
    pub repo_tags: Vec<String>,
    /// The digests of the image's manifests,
    /// "docker.io/library/nginx@sha256:…".
    pub repo_digests: Vec<String>,
    /// Bytes of the image's EROFS file.
    pub size: u64,
    /// The annotations of the image's manifest.
    pub annotations: BTreeMap<String, String>,
    /// The image's configuration.
    pub config: Arc<ImageConfiguration>,
    /// The image's files: a read-only EROFS file system.
    pub rootfs: PathBuf,
}

/// The reason that an operation on images failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is not a valid reference.
    #[error("image reference `{name}`: {cause}")]
    Reference {
        /// The name in the request.
        name: String,
        /// The reason.
        cause: String,
    },
    /// Several image ids begin with this text.
    #[error("image id `{0}` is ambiguous: give more of its characters")]
    Ambiguous(String),
    /// The registry does not have the image.
    #[error("pull {reference}: not found in the registry: {cause}")]
    NotFound {
        /// The image that was asked for.
        reference: String,
        /// The registry's error message.
        cause: String,
    },
    /// The registry demands other credentials.
    #[error("pull {reference}: the registry refuses access: {cause}; check the credentials")]
    Unauthorized {
        /// The image that was asked for.
        reference: String,
        /// The registry's error message.
        cause: String,
    },
    /// The registry cannot be reached or does not work.
    #[error("pull {reference}: {stage}: {cause}")]
    Registry {
        /// The image that was asked for.
        reference: String,
        /// The part that was being fetched.
        stage: String,
        /// The reason.
        cause: String,
    },
    /// The pull took too long.
    #[error("pull {reference}: {stage}: {cause}")]
    Timeout {
        /// The image that was asked for.
        reference: String,
        /// The part that was being fetched.
        stage: String,
        /// The limit that was passed.
        cause: String,
    },
    /// The content is not as promised, or is not an image that may be used.
    #[error("pull {reference}: {cause}")]
    Refused {
        /// The image that was asked for.
        reference: String,
        /// The reason.
        cause: String,
    },
    /// A `hosts.toml`, or a certificate that it names, cannot be used.
    #[error("registry hosts: {path}: {cause}")]
    Hosts {
        /// The file.
        path: PathBuf,
        /// The reason.
        cause: String,
    },
    /// The disk would have less free space than `min_free`.
    #[error(
        "pull {reference}: No space left: {free_mib} MiB are free on the disk of {path}, and `min_free_mib` of \
         [images] keeps {min_free_mib} MiB free: remove images, or make room"
    )]
    NoRoom {
        /// The image that was asked for.
        reference: String,
        /// A folder on that disk.
        path: PathBuf,
        /// MiB that are free.
        free_mib: u64,
        /// The configured minimum, MiB.
        min_free_mib: u64,
    },
    /// Too many pulls wait for others.
    #[error("pull {reference}: {waiting} pulls wait already (`parallel_pulls` of [images]): try again later")]
    Busy {
        /// The image that was asked for.
        reference: String,
        /// The number of waiting pulls.
        waiting: usize,
    },
    /// The process that unpacks layers failed.
    #[error("pull {reference}: unpack: {cause}")]
    Unpacker {
        /// The image that was asked for.
        reference: String,
        /// The way in which it ended.
        cause: String,
    },
    /// A file of the store failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// mkfs.erofs failed.
    #[error("make root filesystem: mkfs.erofs: {0} (it is in Debian's package erofs-utils)")]
    Mkfs(String),
    /// The database of the store failed.
    #[error("image metadata")]
    Metadata(#[source] io::Error),
}

impl Error {
    /// The part of the error that the registry, or the check of its answer,
    /// gave.
    fn cause_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::NotFound { cause, .. }
            | Self::Unauthorized { cause, .. }
            | Self::Registry { cause, .. }
            | Self::Timeout { cause, .. }
            | Self::Refused { cause, .. } => Some(cause),
            _ => None,
        }
    }

    /// Whether the cause is a full disk.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::NoRoom { .. } => true,
            Self::Mkfs(text) => text.contains("No space left"),
            _ => husk_base::is_full_disk(self),
        }
    }
}
