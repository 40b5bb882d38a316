//! What a CRI request can fail with, and the gRPC code of each: the one place
//! where codes are chosen.

use std::io;
use std::path::PathBuf;

use tonic::{Code, Status};

use crate::container::spec;
use crate::sandbox::registry::{LookupError, NameTaken};
use crate::{agent, apparmor, cdi, host, image, network, storage, streaming, vm};

/// Why a request failed. The text says the stage first.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// What it needs is not built.
    #[error("{0}")]
    Unimplemented(String),
    /// It is not possible in the present state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// It took too long.
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
    Image(#[from] image::Error),
    /// No such sandbox or container.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// Made already, or being made.
    #[error(transparent)]
    NameTaken(#[from] NameTaken),
    /// The container's configuration.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// Programs of a handler's hooks.
    #[error(transparent)]
    Hooks(#[from] spec::hooks::Error),
    /// A device by its name.
    #[error(transparent)]
    Cdi(#[from] cdi::Error),
    /// An image as a volume.
    #[error(transparent)]
    ImageVolume(#[from] storage::image_volumes::Error),
    /// The container's AppArmor profile.
    #[error(transparent)]
    AppArmor(#[from] apparmor::Error),
    /// CNI, netns, tap.
    #[error("network: {0}")]
    Network(#[from] network::Error),
    /// The machine.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// The supervisor of host containers.
    #[error(transparent)]
    Host(#[from] host::Error),
    /// The agent in it.
    #[error("agent: {0}")]
    Agent(#[from] agent::Error),
    /// No URL for a stream.
    #[error(transparent)]
    Streaming(#[from] streaming::TokenError),
    /// The sandbox disk.
    #[error(transparent)]
    Scratch(#[from] storage::Error),
    /// Volumes.
    #[error(transparent)]
    Volume(#[from] storage::volumes::Error),
    /// A file of huskd's own.
    #[error("{stage}: {path}: {cause}")]
    File {
        /// What was being done.
        stage: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
    /// A record that could not be written.
    #[error("write record: {0}")]
    Record(#[from] io::Error),
    /// A task of huskd ended before its time.
    #[error("internal: {0}")]
    Internal(String),
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::InvalidArgument(_) | Self::Spec(_) | Self::Cdi(_) | Self::ImageVolume(_) => {
                Code::InvalidArgument
            }
            Self::Hooks(spec::hooks::Error::TooLarge) => Code::FailedPrecondition,
            Self::Volume(storage::volumes::Error::Invalid { .. }) => Code::InvalidArgument,
            Self::Volume(storage::volumes::Error::Unsupported { .. }) => Code::Unimplemented,
            Self::Unimplemented(_) => Code::Unimplemented,
            Self::FailedPrecondition(_) => Code::FailedPrecondition,
            Self::DeadlineExceeded(_) | Self::Vm(vm::Error::Silent { .. }) => Code::DeadlineExceeded,
            Self::ResourceExhausted(_) => Code::ResourceExhausted,
            Self::NoImage(_) | Self::Lookup(LookupError::Unknown { .. }) => Code::NotFound,
            Self::Lookup(LookupError::Ambiguous { .. }) => Code::InvalidArgument,
            Self::Lookup(LookupError::Unread { .. }) => Code::FailedPrecondition,
            Self::NameTaken(_) => Code::AlreadyExists,
            Self::Host(host::Error::NoCgroups) => Code::FailedPrecondition,
            Self::Streaming(streaming::TokenError::Full) | Self::Vm(vm::Error::NoSlot(_)) => {
                Code::ResourceExhausted
            }
            Self::Agent(error) => error.status.code(),
            Self::AppArmor(apparmor::Error::Invalid(_)) => Code::InvalidArgument,
            Self::AppArmor(apparmor::Error::File { .. }) => Code::Internal,
            Self::AppArmor(_) => Code::FailedPrecondition,
            Self::Image(error) => image_code(error),
            Self::Record(cause)
            | Self::File { cause, .. }
            | Self::Vm(vm::Error::File { cause, .. })
            | Self::Host(host::Error::File { cause, .. })
            | Self::Scratch(storage::Error::File { cause, .. })
            | Self::Volume(storage::volumes::Error::File { cause, .. })
                if cause.kind() == io::ErrorKind::StorageFull =>
            {
                Code::ResourceExhausted
            }
            _ => Code::Internal,
        }
    }
}

fn image_code(error: &image::Error) -> Code {
    use image::Error as E;
    match error {
        E::Reference { .. } | E::Ambiguous(_) => Code::InvalidArgument,
        E::NotFound { .. } => Code::NotFound,
        E::Unauthorized { .. } => Code::Unauthenticated,
        E::Registry { .. } => Code::Unavailable,
        E::Timeout { .. } => Code::DeadlineExceeded,
        E::Refused { .. } => Code::DataLoss,
        E::Hosts { .. } => Code::FailedPrecondition,
        E::File { .. } | E::Mkfs(_) | E::Metadata(_) => {
            if error.is_disk_full() {
                Code::ResourceExhausted
            } else {
                Code::Internal
            }
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
