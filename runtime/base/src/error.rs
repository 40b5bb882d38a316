//! The error of a file that could not be read, written or removed.

use std::io;
use std::path::{Path, PathBuf};

/// A step failed on a file or folder.
///
/// The text names the step and the path; the cause is the [source](std::error::Error::source),
/// and whoever shows the error to a person prints the whole chain.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {}", path.display())]
pub struct FileError {
    /// The step, "make folder".
    pub stage: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// The kernel's reason.
    pub source: io::Error,
}

impl FileError {
    /// For `map_err`: `File::open(path).map_err(FileError::at("open", path))`.
    pub fn at(stage: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { stage, path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::error::Error;

    use super::*;

    #[test]
    fn the_cause_is_in_the_chain_and_not_in_the_text() {
        let path = Path::new("/nonexistent/husk");
        let error = std::fs::read(path).map_err(FileError::at("read record", path)).unwrap_err();
        assert_eq!(error.to_string(), "read record: /nonexistent/husk");
        let cause = error.source().and_then(|source| source.downcast_ref::<io::Error>());
        assert_eq!(cause.unwrap().kind(), io::ErrorKind::NotFound);
    }
}
