//! The error of a file that could not be read, written or removed, and searches in a chain
//! of errors.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

/// A step failed on a file or folder.
///
/// The text names the step and the path; the cause is the [source](std::error::Error::source),
/// and whoever shows the error to a person prints the whole chain.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {}", path.display())]
pub struct FileError {
    /// The step, for example "make folder".
    pub stage: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// The kernel's reason.
    pub source: io::Error,
}

impl FileError {
    /// Makes the error of a step, for `map_err`: `File::open(path).map_err(FileError::at("open", path))`.
    pub fn at(stage: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { stage, path: path.to_owned(), source }
    }
}

/// An error with its causes, for a person. A cause whose text the error repeats is left out.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// Whether a full disk, or a full quota, is among the causes of an error.
#[must_use]
pub fn is_full_disk(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_found_in_the_chain() {
        let full = || FileError {
            stage: "write record",
            path: "/r".into(),
            source: io::Error::from_raw_os_error(libc::ENOSPC),
        };
        assert!(is_full_disk(&full()) && is_full_disk(&io::Error::from_raw_os_error(libc::EDQUOT)));
        assert!(!is_full_disk(&io::Error::from_raw_os_error(libc::EIO)));
        let text = chain(&full());
        assert!(text.starts_with("write record: /r: No space left"), "{text}");
    }

    #[test]
    fn the_cause_is_in_the_chain_and_not_in_the_text() {
        let path = Path::new("/nonexistent/husk");
        let error = std::fs::read(path).map_err(FileError::at("read record", path)).unwrap_err();
        assert_eq!(error.to_string(), "read record: /nonexistent/husk");
        let cause = error.source().and_then(|source| source.downcast_ref::<io::Error>());
        assert_eq!(cause.unwrap().kind(), io::ErrorKind::NotFound);
    }
}
