//! Identifiers in requests, which become file names.

use crate::error::Error;

const MAX: usize = 128;

/// Accepts `[a-zA-Z0-9_.-]{1,128}`, except `.` and `..`; `what` names the field.
pub fn check(what: &str, id: &str) -> Result<(), Error> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if id.is_empty() || id.len() > MAX || !id.bytes().all(legal) || id == "." || id == ".." {
        return Err(Error::Invalid(format!("{what} {id:?} must be 1 to {MAX} of a-z A-Z 0-9 _ . -")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_safe_as_file_names_pass() {
        for id in ["a", "0123456789abcdef", "exec-1_2.3", ".hidden", &"x".repeat(MAX)] {
            assert!(check("id", id).is_ok(), "{id}");
        }
    }

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for id in ["", ".", "..", "a/b", "../x", "a b", "a\n", "é", &"x".repeat(MAX + 1)] {
            assert!(check("id", id).is_err(), "{id}");
        }
    }
}
