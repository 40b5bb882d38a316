//! The gRPC status of an error: the one place where codes are chosen.

use husk_oci::{apparmor, hooks};
use husk_pods::Error;
use husk_pods::model::LookupError;
use husk_streaming::TokenError;
use tonic::{Code, Status};

/// The status that a client gets for an error. The text says the stage first.
pub(crate) fn of(error: &Error) -> Status {
    Status::new(code(error), husk_base::chain(error))
}

fn code(error: &Error) -> Code {
    match error {
        Error::Invalid(_) | Error::Spec(_) | Error::Cdi(_) | Error::ImageVolume(_) => Code::InvalidArgument,
        Error::Hooks(hooks::Error::TooLarge) => Code::FailedPrecondition,
        Error::Volume(husk_volumes::Error::Invalid { .. }) => Code::InvalidArgument,
        Error::Volume(husk_volumes::Error::Unsupported { .. }) => Code::Unimplemented,
        Error::Unsupported(_) => Code::Unimplemented,
        Error::WrongState(_) => Code::FailedPrecondition,
        Error::Timeout(_) | Error::Vm(husk_vm::Error::Silent { .. }) => Code::DeadlineExceeded,
        Error::Full(_) => Code::ResourceExhausted,
        Error::NoImage(_) | Error::Lookup(LookupError::Unknown { .. }) => Code::NotFound,
        Error::Lookup(LookupError::Ambiguous { .. }) => Code::InvalidArgument,
        Error::Lookup(LookupError::Unread { .. }) => Code::FailedPrecondition,
        Error::NameTaken(_) => Code::AlreadyExists,
        Error::Host(husk_hostpod::Error::NoCgroups) => Code::FailedPrecondition,
        Error::Streaming(TokenError::Full) | Error::Vm(husk_vm::Error::NoSlot(_)) => Code::ResourceExhausted,
        Error::Agent(error) => error.status.code(),
        Error::AppArmor(apparmor::Error::Invalid(_)) => Code::InvalidArgument,
        Error::AppArmor(apparmor::Error::File { .. }) => Code::Internal,
        Error::AppArmor(_) => Code::FailedPrecondition,
        Error::Image(error) => image_code(error),
        error if husk_base::is_full_disk(error) => Code::ResourceExhausted,
        _ => Code::Internal,
    }
}

fn image_code(error: &husk_image::Error) -> Code {
    use husk_image::Error as E;
    match error {
        E::Reference { .. } | E::Ambiguous(_) => Code::InvalidArgument,
        E::Busy { .. } => Code::ResourceExhausted,
        E::NotFound { .. } => Code::NotFound,
        E::Unauthorized { .. } => Code::Unauthenticated,
        E::Registry { .. } => Code::Unavailable,
        E::Timeout { .. } => Code::DeadlineExceeded,
        E::Refused { .. } => Code::DataLoss,
        E::Hosts { .. } => Code::FailedPrecondition,
        E::NoRoom { .. } | E::File(_) | E::Mkfs(_) | E::Metadata(_) | E::Unpacker { .. } => {
            if error.is_disk_full() { Code::ResourceExhausted } else { Code::Internal }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use husk_base::FileError;

    use super::*;

    fn full() -> io::Error {
        io::ErrorKind::StorageFull.into()
    }

    #[test]
    fn a_full_disk_is_called_so_wherever_it_strikes() {
        let file = || FileError { stage: "write", path: "/x".into(), source: full() };
        for error in [
            Error::Image(husk_image::Error::File(file())),
            Error::Image(husk_image::Error::Metadata(full())),
            Error::Network(husk_network::Error::Record(file())),
            Error::File(file()),
            Error::Volume(husk_volumes::Error::File { stage: "mount", path: "/x".into(), cause: full() }),
        ] {
            let status = of(&error);
            assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
            let count = status.message().matches(&full().to_string()).count();
            assert_eq!(count, 1, "the cause is told once: {status}");
        }
    }
}
