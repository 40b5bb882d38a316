//! Errors that name the stage in which they arose.

use std::error::Error;

/// An error, and the stage in which it arose.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {cause}")]
pub struct StageError {
    /// The step that failed, "load the kernel".
    pub stage: &'static str,
    /// The error that the step met.
    #[source]
    pub cause: Box<dyn Error + Send + Sync>,
}

/// Returns a function that adds the stage to an error.
pub fn at<E: Into<Box<dyn Error + Send + Sync>>>(stage: &'static str) -> impl Fn(E) -> StageError {
    move |cause| StageError { stage, cause: cause.into() }
}
