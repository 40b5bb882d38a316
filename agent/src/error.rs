//! Errors of RPCs. The gRPC code is chosen here and nowhere else; the header of
//! `agent.proto` says what each means.

use std::fmt;

use tonic::Status;

/// A request was not done.
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
    /// The state forbids it.
    #[error("{0}")]
    Precondition(String),
    /// One more would be too many.
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

/// Turns the errors of the agent's parts into an RPC's.
pub trait Stage<T> {
    /// The failure of a stage that might have succeeded.
    fn stage(self, stage: &'static str) -> Result<T, Error>;
    /// The failure of a request that never can; `what` is wrong with it.
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
