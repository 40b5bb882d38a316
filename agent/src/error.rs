//! Errors of RPCs. The gRPC code is chosen only here; the header of
//! `agent.proto` says what each code means.

use std::fmt;

use tonic::Status;

/// The reason that a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request can never succeed.
    #[error("{0}")]
    Invalid(String),
    /// The request is about something that does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The id is in use.
    #[error("{0}")]
    Exists(String),
    /// The present state forbids the request.
    #[error("{0}")]
    Precondition(String),
    /// A bound would be exceeded.
    #[error("{0}")]
    Exhausted(String),
    /// A stage of the request failed.
    #[error("{stage}: {cause}")]
    Failed { stage: &'static str, cause: String },
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Invalid(_) => Self::invalid_argument(message),
            Error::NotFound(_) => Self::not_found(message),
            Error::Exists(_) => Self::already_exists(message),
            Error::Precondition(_) => Self::failed_precondition(message),
            Error::Exhausted(_) => Self::resource_exhausted(message),
            Error::Failed { .. } => Self::internal(message),
        }
    }
}

/// Turns the errors of the agent's parts into errors of an RPC.
pub trait Stage<T> {
    /// The error of a stage that can succeed at another time.
    fn stage(self, stage: &'static str) -> Result<T, Error>;
    /// The error of a request that can never succeed, because of `what`.
    fn invalid(self, what: &'static str) -> Result<T, Error>;
}

impl<T, E: fmt::Display> Stage<T> for Result<T, E> {
    fn stage(self, stage: &'static str) -> Result<T, Error> {
        self.map_err(|error| Error::Failed { stage, cause: error.to_string() })
    }

    fn invalid(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|error| Error::Invalid(format!("{what}: {error}")))
    }
}
