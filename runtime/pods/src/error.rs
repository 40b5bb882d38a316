//! Reasons for which an operation can fail.

use std::io;
use std::path::PathBuf;

use husk_backend as backend;
use husk_oci::{apparmor, cdi, hooks};

use crate::lane::{self, NoResult};
use crate::model::{LookupError, NameTaken};

/// An operation failed. The text says the stage first.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// The request needs something that is not built.
    #[error("{0}")]
    Unimplemented(String),
    /// The present state does not allow the request.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request took too long.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// More than there is room for.
    #[error("{0}")]
    ResourceExhausted(String),
    /// The image is not here.
    #[error("image `{0}` not found: pull it first")]
    NoImage(String),
    /// Images.
    #[error(transparent)]
    Image(#[from] husk_image::Error),
    /// No such sandbox or container.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// Made already, or being made.
    #[error(transparent)]
    NameTaken(#[from] NameTaken),
    /// The container's configuration.
    #[error(transparent)]
    Spec(#[from] husk_oci::Error),
    /// Programs of a handler's hooks.
    #[error(transparent)]
    Hooks(#[from] hooks::Error),
    /// A device by its name.
    #[error(transparent)]
    Cdi(#[from] cdi::Error),
    /// An image as a volume.
    #[error(transparent)]
    ImageVolume(#[from] husk_volumes::image::Error),
    /// The container's AppArmor profile.
    #[error(transparent)]
    AppArmor(#[from] apparmor::Error),
    /// CNI, netns, tap.
    #[error("network: {0}")]
    Network(#[from] husk_network::Error),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] husk_vm::Error),
    /// The supervisor of host containers.
    #[error(transparent)]
    Host(#[from] husk_hostpod::Error),
    /// The pod's agent.
    #[error("agent: {0}")]
    Agent(#[from] husk_agent_client::Error),
    /// No URL for a stream.
    #[error(transparent)]
    Streaming(#[from] husk_streaming::TokenError),
    /// The writable disk of a VM.
    #[error(transparent)]
    Disk(#[from] husk_vm::DiskError),
    /// Volumes.
    #[error(transparent)]
    Volume(#[from] husk_volumes::Error),
    /// A file of huskd's own.
    #[error("{stage}: {path}: {cause}")]
    File {
        /// The step.
        stage: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        cause: io::Error,
    },
    /// A record that could not be written.
    #[error("write record: {0}")]
    Record(#[from] io::Error),
    /// A task of huskd ended before its time.
    #[error("internal: {0}")]
    Internal(String),
}

impl From<lane::Failed> for Error {
    fn from(error: lane::Failed) -> Self {
        match error.why {
            NoResult::Late(_) | NoResult::Busy => Self::DeadlineExceeded(error.to_string()),
            NoResult::Broken => Self::Internal(error.to_string()),
        }
    }
}

impl From<backend::Error> for Error {
    fn from(error: backend::Error) -> Self {
        match error {
            backend::Error::Vm(error) => error.into(),
            backend::Error::Host(error) => error.into(),
            backend::Error::Disk(error) => error.into(),
            backend::Error::Network(error) => error.into(),
            backend::Error::Volume(error) => error.into(),
            backend::Error::Spec(error) => error.into(),
            backend::Error::Hooks(error) => error.into(),
            backend::Error::AppArmor(error) => error.into(),
            backend::Error::File { stage, path, cause } => Self::File { stage, path, cause },
            error @ backend::Error::Seed(_) => Self::Internal(error.to_string()),
            backend::Error::Precondition(problem) => Self::FailedPrecondition(problem),
        }
    }
}
