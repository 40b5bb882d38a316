//! All devices of the machine, or of the host, for a privileged container.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::OciSpecError;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Spec};

const FOLDER: &str = "/dev";

/// Entries of [`FOLDER`] that are left out: file systems, which every container
/// has by itself, and the console, because a container's console is its
/// terminal.
const NOT_DEVICES: &[&str] = &["console", "fd", "hugepages", "mqueue", "pts", "shm"];

/// Most devices that a container gets.
const MAX: usize = 4096;

/// The devices cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory cannot be read.
    #[error("read {FOLDER}: {0}")]
    Read(#[from] io::Error),
    /// A device cannot be put into the configuration.
    #[error(transparent)]
    Oci(#[from] OciSpecError),
}

/// Adds all devices to a configuration, except where it has other devices at
/// the same paths.
pub fn add_all(spec: &mut Spec) -> Result<(), Error> {
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let devices = linux.devices_mut().get_or_insert_default();
    let taken: HashSet<PathBuf> = devices.iter().map(|device| device.path().clone()).collect();
    devices.extend(below(Path::new(FOLDER))?.into_iter().filter(|device| !taken.contains(device.path())));
    Ok(())
}

fn below(top: &Path) -> Result<Vec<LinuxDevice>, Error> {
    let mut devices = Vec::new();
    let mut entries: Vec<_> = fs::read_dir(top)?.flatten().collect();
    entries.retain(|entry| NOT_DEVICES.iter().all(|other| *other != entry.file_name()));
    while let Some(entry) = entries.pop() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // A directory that has gone in the meantime belonged to a device
            // that has gone.
            entries.extend(fs::read_dir(entry.path()).into_iter().flatten().flatten());
        } else if devices.len() < MAX
            && let Some(device) = device(&entry.path())?
        {
            devices.push(device);
        }
    }
    Ok(devices)
}

/// The device at a path, if there is one. Links are not followed.
fn device(path: &Path) -> Result<Option<LinuxDevice>, Error> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(None) };
    let kind = metadata.file_type();
    let kind = match (kind.is_char_device(), kind.is_block_device()) {
        (true, _) => LinuxDeviceType::C,
        (_, true) => LinuxDeviceType::B,
        _ => return Ok(None),
    };
    let device = LinuxDeviceBuilder::default()
        .path(path)
        .typ(kind)
        .major(libc::major(metadata.rdev()))
        .minor(libc::minor(metadata.rdev()))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()?;
    Ok(Some(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_privileged_container_has_all_devices_and_keeps_those_that_it_had() {
        let json = r#"{"ociVersion": "1.0.2", "linux": {"devices": [
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 5}, {"path": "/dev/own", "type": "c", "major": 1, "minor": 3}]}}"#;
        let mut spec: Spec = serde_json::from_str(json).unwrap();
        add_all(&mut spec).unwrap();
        let devices = spec.linux().as_ref().unwrap().devices().clone().unwrap();
        let at = |path: &str| {
            let found: Vec<_> = devices.iter().filter(|it| it.path() == Path::new(path)).collect();
            found.iter().map(|device| (device.major(), device.minor())).collect::<Vec<_>>()
        };
        assert_eq!(
            (at("/dev/null"), at("/dev/own"), at("/dev/zero")),
            (vec![(1, 5)], vec![(1, 3)], vec![(1, 5)])
        );
        let others = ["/dev/pts", "/dev/shm", "/dev/console"];
        assert!(devices.iter().all(|device| others.iter().all(|other| !device.path().starts_with(other))));
    }

    #[test]
    fn what_is_no_device_is_passed_over_at_any_depth() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("net/deep")).unwrap();
        fs::write(folder.path().join("net/file"), "").unwrap();
        std::os::unix::fs::symlink("/dev/null", folder.path().join("net/deep/link")).unwrap();
        assert!(below(folder.path()).unwrap().is_empty());
        assert!(below(&folder.path().join("none")).is_err());
    }
}
