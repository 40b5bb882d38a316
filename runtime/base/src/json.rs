//! Records on disk, in JSON.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{crash, dirs};

/// Reads a record.
///
/// # Errors
/// The file system's; `InvalidData` or `UnexpectedEof` if the file holds something else.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&std::fs::read(path)?).map_err(io::Error::from)
}

/// Replaces a record as a whole: a reader sees the old one or the new one, and so
/// does whoever reads it after a power cut. Only root can read it, because a record
/// may hold a pod's secrets.
///
/// # Errors
/// The file system's; the old record is then unchanged.
pub fn write_json<T: Serialize>(path: &Path, record: &T) -> io::Result<()> {
    let new = path.with_extension("new");
    let text = serde_json::to_vec_pretty(record)?;
    crash::point("record to be written");
    let written = dirs::private_file(&new)
        // A file system may carry out a rename before it has written the file.
        .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_data()))
        .and_then(|()| {
            crash::point("record written beside the old one");
            std::fs::rename(&new, path)
        });
    crash::point("record replaced");
    if written.is_err() {
        // Half a record is of no use, and takes room that a full disk does not have.
        let _ = std::fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_record_is_replaced_as_a_whole_and_is_for_root_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        write_json(&path, &vec![1, 2]).unwrap();
        write_json(&path, &vec![3]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), [3]);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // A folder in its place cannot be replaced by a file.
        let folder_there = folder.path().join("folder.json");
        std::fs::create_dir(&folder_there).unwrap();
        write_json(&folder_there, &vec![4]).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        assert_eq!(read_json::<String>(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
