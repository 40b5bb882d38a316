//! Kernel parameters of the pod.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A parameter could not be set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not the name of a parameter.
    #[error("sysctl {0:?} is not a parameter's name, such as net.ipv4.ip_forward")]
    Name(String),
    /// The guest's kernel does not know it, or does not take the value.
    #[error("sysctl {name} = {value:?}: {cause}")]
    Refused {
        /// Which.
        name: String,
        /// As asked for.
        value: String,
        /// The kernel's answer.
        cause: io::Error,
    },
}

/// Sets one parameter.
pub fn set(name: &str, value: &str) -> Result<(), Error> {
    let path = path(name).ok_or_else(|| Error::Name(name.to_owned()))?;
    let written = fs::OpenOptions::new().write(true).open(path).and_then(|file| {
        // One write: the kernel takes a value as a whole.
        io::Write::write_all(&mut &file, value.as_bytes())
    });
    written.map_err(|cause| Error::Refused { name: name.to_owned(), value: value.to_owned(), cause })
}

/// The file of a parameter. Its first separator tells which of the two
/// notations is used: `net.ipv4.conf.eth0/1.rp_filter` or
/// `net/ipv4/conf/eth0.1/rp_filter` (sysctl(8)).
fn path(name: &str) -> Option<PathBuf> {
    let dotted =
        name.find(['.', '/']).is_none_or(|at| name.get(at..).is_some_and(|rest| rest.starts_with('.')));
    let swap = |c| match c {
        '.' if dotted => '/',
        '/' if dotted => '.',
        other => other,
    };
    let relative: String = name.chars().map(swap).collect();
    let legal = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.:@".contains(&b))
    };
    relative.split('/').all(legal).then(|| Path::new("/proc/sys").join(relative))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn both_notations_lead_to_the_same_file() {
        let expected = Path::new("/proc/sys/net/ipv4/conf/eth0.1/rp_filter");
        assert_eq!(path("net.ipv4.conf.eth0/1.rp_filter").unwrap(), expected);
        assert_eq!(path("net/ipv4/conf/eth0.1/rp_filter").unwrap(), expected);
        assert_eq!(path("vm").unwrap(), Path::new("/proc/sys/vm"));
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "net..x", "../../etc/passwd", "net/../../x", "net.//.x", "a b", "/etc/x"]
        {
            assert!(path(name).is_none(), "{name}");
        }
    }

    #[test]
    fn the_error_names_the_parameter() {
        let error = set("net.husk.no_such_parameter", "1").unwrap_err().to_string();
        assert!(error.contains("net.husk.no_such_parameter"), "{error}");
    }
}
