//! Reasons for which an operation can fail.

use husk_backend as backend;
use husk_base::{FileError, chain};
use husk_oci::{apparmor, cdi, hooks};

use crate::lane::{self, NoResult};
use crate::model::{LookupError, NameTaken};

/// An operation failed. The text says the stage first; a cause is the
/// [source](std::error::Error::source), and whoever shows the error prints the chain.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request can never succeed.
    #[error("{0}")]
    Invalid(String),
    /// The request asks for something that Husk does not have.
    #[error("{0}")]
    Unsupported(String),
    /// The pod, the container or the node is in a state that forbids it.
    #[error("{0}")]
    WrongState(String),
    /// A limit on time has passed.
    #[error("{0}")]
    Timeout(String),
    /// A bound of the node is reached.
    #[error("{0}")]
    Full(String),
    /// A task or a message of huskd itself broke.
    #[error("{0}")]
    Broken(String),
    /// The node does not have the image.
    #[error("image `{0}` not found: pull it first")]
    NoImage(String),
    /// The image store failed.
    #[error(transparent)]
    Image(#[from] husk_image::Error),
    /// An id does not lead to one pod or container.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// The name belongs to another pod or container.
    #[error(transparent)]
    NameTaken(#[from] NameTaken),
    /// The container's configuration cannot be had.
    #[error(transparent)]
    Spec(#[from] husk_oci::Error),
    /// The programs of a handler's hooks cannot be read.
    #[error(transparent)]
    Hooks(#[from] hooks::Error),
    /// A CDI device cannot be had.
    #[error(transparent)]
    Cdi(#[from] cdi::Error),
    /// An image cannot be a volume.
    #[error(transparent)]
    ImageVolume(#[from] husk_volumes::image::Error),
    /// The container's AppArmor profile cannot be had.
    #[error(transparent)]
    AppArmor(#[from] apparmor::Error),
    /// CNI, the network namespace or a tap failed.
    #[error("network")]
    Network(#[from] husk_network::Error),
    /// The VM failed.
    #[error(transparent)]
    Vm(#[from] husk_vm::Error),
    /// The supervisor of host containers failed.
    #[error(transparent)]
    Host(#[from] husk_hostpod::Error),
    /// The pod's agent failed, or does not answer.
    #[error("agent")]
    Agent(#[from] husk_agent_client::Error),
    /// A stream gets no URL.
    #[error(transparent)]
    Streaming(#[from] husk_streaming::TokenError),
    /// The writable disk of a VM cannot be made.
    #[error(transparent)]
    Disk(#[from] husk_vm::DiskError),
    /// A volume cannot be had.
    #[error(transparent)]
    Volume(#[from] husk_volumes::Error),
    /// The scope of systemd that is the pod's control group cannot be had.
    #[error(transparent)]
    Systemd(#[from] husk_systemd::Error),
    /// A file could not be read, written or removed.
    #[error(transparent)]
    File(#[from] FileError),
}

impl From<lane::Failed> for Error {
    fn from(error: lane::Failed) -> Self {
        match error.why {
            NoResult::Late(_) | NoResult::Busy => Self::Timeout(error.to_string()),
            NoResult::Broken => Self::Broken(error.to_string()),
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
            backend::Error::Systemd(error) => error.into(),
            backend::Error::File(error) => error.into(),
            error @ backend::Error::Seed(_) => Self::Broken(chain(&error)),
            backend::Error::WrongState(problem) => Self::WrongState(problem),
        }
    }
}
