//! Reads configuration that others have written, if it is a file of a sensible size.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Reads the text of a file of at most `most` bytes.
///
/// # Errors
/// The kernel's; `InvalidInput` for anything but a regular file, `FileTooLarge`, and
/// `InvalidData` for text that is not UTF-8.
pub fn read(path: &Path, most: u64) -> io::Result<String> {
    // A fifo in the file's place must not hold the daemon up.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = String::new();
    if file.take(most + 1).read_to_string(&mut text)? as u64 > most {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {most} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_of_a_sensible_size_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "four").unwrap();
        assert_eq!(read(&path, 4).unwrap(), "four");
        assert!(read(&path, 3).unwrap_err().to_string().contains("larger than 3 bytes"));
        assert_eq!(read(&folder.path().join("none"), 4).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(read(folder.path(), 4).unwrap_err().to_string().contains("not a regular file"));
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&fifo, 4).unwrap_err().to_string().contains("not a regular file"));
    }
}
