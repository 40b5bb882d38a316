//! Finds virtio block devices by the serial number that the host gave them.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

const SYS_BLOCK: &str = "/sys/block";

/// How long an empty slot may take to get its disk. The host attaches the disk
/// before it names it in a request, so only the interrupt can be late.
const DEADLINE: Duration = Duration::from_secs(5);

/// A disk could not be found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No device has this serial number.
    #[error("no block device has the serial number {0:?}")]
    Unknown(String),
    /// The slot stayed empty.
    #[error("the block device with the serial number {0:?} has stayed empty for {deadline} s", deadline = DEADLINE.as_secs())]
    Empty(String),
    /// sysfs could not be read.
    #[error("read {SYS_BLOCK}: {0}")]
    Sysfs(#[source] io::Error),
}

/// The machine's disks. All of them exist from the start, some as empty slots.
/// Serial numbers are read once, because each reading is a request to the
/// device.
#[derive(Default)]
pub struct Disks(Mutex<HashMap<String, PathBuf>>);

impl Disks {
    /// Waits until the disk has a size, and returns its device node.
    pub async fn wait_for(&self, serial: &str) -> Result<PathBuf, Error> {
        let name = self.find(serial)?;
        let size = Path::new(SYS_BLOCK).join(&name).join("size");
        let deadline = Instant::now() + DEADLINE;
        let mut pause = Duration::from_millis(1);
        while has_no_size(&size)? {
            if Instant::now() >= deadline {
                return Err(Error::Empty(serial.to_owned()));
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(Path::new("/dev").join(name))
    }

    fn find(&self, serial: &str) -> Result<PathBuf, Error> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains_key(serial) {
            *known = scan(Path::new(SYS_BLOCK)).map_err(Error::Sysfs)?;
        }
        known.get(serial).cloned().ok_or_else(|| Error::Unknown(serial.to_owned()))
    }
}

fn has_no_size(path: &Path) -> Result<bool, Error> {
    let sectors = fs::read_to_string(path).map_err(Error::Sysfs)?;
    Ok(sectors.trim() == "0")
}

/// The names of the block devices below `directory`, by their serial number.
fn scan(directory: &Path) -> io::Result<HashMap<String, PathBuf>> {
    let mut found = HashMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // Only virtio disks have this attribute here (virtio 1.2 §5.2.6.1,
        // VIRTIO_BLK_T_GET_ID).
        if let Ok(serial) = fs::read_to_string(entry.path().join("serial")) {
            found.insert(serial.trim().to_owned(), entry.file_name().into());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_found_by_their_serial_number() {
        let directory = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", Some("scratch")), ("vdb", Some("slot0\n")), ("loop0", None)] {
            let device = directory.path().join(name);
            fs::create_dir(&device).unwrap();
            if let Some(serial) = serial {
                fs::write(device.join("serial"), serial).unwrap();
            }
        }
        let found = scan(directory.path()).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found["slot0"], Path::new("vdb"));
    }

    #[test]
    fn a_slot_without_a_disk_has_no_size() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "0\n").unwrap();
        assert!(has_no_size(file.path()).unwrap());
        fs::write(file.path(), "2048\n").unwrap();
        assert!(!has_no_size(file.path()).unwrap());
    }
}
