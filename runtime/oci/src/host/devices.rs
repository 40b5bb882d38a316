//! Devices of the host in a container: those that the client names. The agent gives a
//! privileged container all others too.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use husk_proto::cri;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceType};

use super::Error;
use crate::devices::rule;

/// How many devices one request may lead to.
const MAX: usize = 4096;

/// The devices that the client names, with the rules that let the container use them.
pub(super) fn asked(asked: &[cri::Device]) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>), Error> {
    let (mut devices, mut rules) = (Vec::new(), Vec::new());
    for wanted in asked {
        let invalid = |reason: &str| Error::Invalid(format!("device {}: {reason}", wanted.host_path));
        let host = Path::new(&wanted.host_path);
        let container = match wanted.container_path.as_str() {
            "" => host.to_owned(),
            path => PathBuf::from(path),
        };
        let host = host.canonicalize().map_err(|error| invalid(&error.to_string()))?;
        let found = if host.is_dir() {
            below(&host, &container)?
        } else {
            device(&host, &container)?.into_iter().collect()
        };
        if found.is_empty() {
            return Err(invalid("is no device"));
        }
        for device in found {
            rules.push(rule(&device, wanted)?);
            devices.push(device);
        }
        if devices.len() > MAX {
            return Err(invalid("there are too many devices"));
        }
    }
    Ok((devices, rules))
}

/// The devices in a directory, at the same names below another.
fn below(host: &Path, container: &Path) -> Result<Vec<LinuxDevice>, Error> {
    let mut devices = Vec::new();
    let mut folders = vec![host.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(path);
            } else if devices.len() <= MAX
                && let Ok(inside) = path.strip_prefix(host)
            {
                devices.extend(device(&path, &container.join(inside))?);
            }
        }
    }
    Ok(devices)
}

/// The device at a path, if one is there; links are not followed.
fn device(host: &Path, container: &Path) -> Result<Option<LinuxDevice>, Error> {
    let Ok(metadata) = fs::symlink_metadata(host) else { return Ok(None) };
    let kind = if metadata.file_type().is_char_device() {
        LinuxDeviceType::C
    } else if metadata.file_type().is_block_device() {
        LinuxDeviceType::B
    } else {
        return Ok(None);
    };
    let number = |part: u32| i64::from(part);
    let device = LinuxDeviceBuilder::default()
        .path(container)
        .typ(kind)
        .major(number(libc::major(metadata.rdev())))
        .minor(number(libc::minor(metadata.rdev())))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()?;
    Ok(Some(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(host_path: &str, permissions: &str) -> Vec<cri::Device> {
        vec![cri::Device {
            host_path: host_path.into(),
            container_path: "/dev/x".into(),
            permissions: permissions.into(),
        }]
    }

    #[test]
    fn a_device_that_is_named_can_be_used_as_far_as_it_says() {
        let (devices, rules) = asked(&wanted("/dev/zero", "r")).unwrap();
        let device = devices.first().unwrap();
        assert_eq!((device.typ(), device.major(), device.minor()), (LinuxDeviceType::C, 1, 5));
        assert_eq!(device.path(), Path::new("/dev/x"));
        let rule = rules.first().unwrap();
        assert_eq!((rule.allow(), rule.major(), rule.access().as_deref()), (true, Some(1), Some("r")));
    }

    #[test]
    fn what_is_no_device_is_refused_by_name() {
        for (path, permissions) in
            [("/etc/passwd", "rwm"), ("/dev/no-such", "rwm"), ("/dev/zero", "rx"), ("/dev/zero", "")]
        {
            let error = asked(&wanted(path, permissions)).unwrap_err().to_string();
            assert!(error.contains(path), "{error}");
        }
    }
}
