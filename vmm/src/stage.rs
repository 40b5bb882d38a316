//! Errors that name the stage in which they arose.

use std::error::Error;

/// Something failed.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {cause}")]
pub struct StageError {
    /// The step that failed, "load the kernel".
    pub stage: &'static str,
    /// The error that it met.
    #[source]
    pub cause: Box<dyn Error + Send + Sync>,
}

/// Names the stage in which an error arose.
pub fn at<E: Into<Box<dyn Error + Send + Sync>>>(stage: &'static str) -> impl Fn(E) -> StageError {
    move |cause| StageError { stage, cause: cause.into() }
}
