//! OCI images: pulled and verified, unpacked, kept as one EROFS file each.
//!
//! A pull works in a folder of its own and becomes visible by one transaction;
//! whatever a crash leaves is swept when the store opens.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;

mod chain;
mod document;
mod erofs;
mod hosts;
mod layer;
mod pull;
mod reference;
mod referral;
mod registry;
mod store;
mod tree;

pub use layer::Limits;
pub use reference::{full_name, is_at};
pub use registry::Credentials;
pub use store::{FsInfo, ImageStore};

/// Largest file of certificates that is read.
const MAX_PEM: u64 = 4 << 20;

/// How images are pulled.
#[derive(Clone, Debug)]
pub struct ImageConfig {
    /// Registries spoken to over plain HTTP, besides loopback addresses.
    pub insecure_registries: Vec<String>,
    /// Hosts that registries may send huskd to for tokens, passwords included, and for
    /// content, whatever their addresses are.
    pub trusted_hosts: Vec<String>,
    /// The folder with a `<host>/hosts.toml` for each registry that has mirrors.
    pub hosts_dir: PathBuf,
    /// Most time without a byte from the registry.
    pub stall_timeout: std::time::Duration,
    /// Most time for a pull as a whole.
    pub pull_timeout: std::time::Duration,
    /// What an image may be made of.
    pub limits: Limits,
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
        }
    }
}

/// An image that is here. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of its configuration, "sha256:…".
    pub id: Arc<str>,
    /// The tags that lead to it, "docker.io/library/nginx:1".
    pub repo_tags: Vec<String>,
    /// The digests that lead to it, "docker.io/library/nginx@sha256:…".
    pub repo_digests: Vec<String>,
    /// Bytes of its EROFS file.
    pub size: u64,
    /// Of its manifest.
    pub annotations: BTreeMap<String, String>,
    /// What it says about itself.
    pub config: Arc<ImageConfiguration>,
    /// Its files: a read-only EROFS filesystem.
    pub rootfs: PathBuf,
}

/// Something is wrong with an image, or on the way to it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is not one.
    #[error("image reference `{name}`: {cause}")]
    Reference {
        /// As given.
        name: String,
        /// What is wrong with it.
        cause: String,
    },
    /// Several images have ids that start so.
    #[error("image id `{0}` is ambiguous: give more of its characters")]
    Ambiguous(String),
    /// The registry does not have it.
    #[error("pull {reference}: not found in the registry: {cause}")]
    NotFound {
        /// What was asked for.
        reference: String,
        /// The registry's words.
        cause: String,
    },
    /// The registry wants other credentials.
    #[error("pull {reference}: the registry refuses access: {cause}; check the credentials")]
    Unauthorized {
        /// What was asked for.
        reference: String,
        /// The registry's words.
        cause: String,
    },
    /// The registry cannot be reached or does not do its work.
    #[error("pull {reference}: {stage}: {cause}")]
    Registry {
        /// What was asked for.
        reference: String,
        /// What was being fetched.
        stage: String,
        /// What went wrong.
        cause: String,
    },
    /// It took too long.
    #[error("pull {reference}: {stage}: {cause}")]
    Timeout {
        /// What was asked for.
        reference: String,
        /// What was being fetched.
        stage: String,
        /// Which limit was passed.
        cause: String,
    },
    /// What came is not what was promised, or not an image that may be used.
    #[error("pull {reference}: {cause}")]
    Refused {
        /// What was asked for.
        reference: String,
        /// Why it is refused.
        cause: String,
    },
    /// What `hosts.toml` says of the registry, or a certificate that it names.
    #[error("registry hosts: {path}: {cause}")]
    Hosts {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// A file of the store.
    #[error("{stage}: {path}: {cause}")]
    File {
        /// What was being done.
        stage: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
    /// mkfs.erofs failed.
    #[error("make root filesystem: mkfs.erofs: {0} (it is in Debian's package erofs-utils)")]
    Mkfs(String),
    /// The metadata.
    #[error("image metadata: {0}")]
    Metadata(String),
}

impl Error {
    /// What the registry, or the look at its answer, said.
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

    /// Whether a full disk is behind it.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::File { cause, .. } => cause.kind() == io::ErrorKind::StorageFull,
            Self::Mkfs(text) => text.contains("No space left"),
            _ => false,
        }
    }
}
