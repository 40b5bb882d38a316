//! Devices of a container in a VM: those that every Linux system has by the same
//! name and number, so that the guest's own stands for the host's. Any other
//! device is a piece of hardware, which the VM does not have.

use husk_proto::cri;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};

use super::Error;

/// The path, major and minor number of each (Linux `Documentation/admin-guide/devices.txt`).
const DEVICES: [(&str, i64, i64); 9] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
    ("/dev/ptmx", 5, 2),
    ("/dev/net/tun", 10, 200),
    ("/dev/fuse", 10, 229),
];

/// The devices for runc to make, with the rules that let the container use them.
pub(super) fn asked(asked: &[cri::Device]) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>), Error> {
    let (mut devices, mut rules) = (Vec::new(), Vec::new());
    for wanted in asked {
        let device = node(wanted)?;
        rules.push(rule(&device, wanted)?);
        devices.push(device);
    }
    Ok((devices, rules))
}

fn node(device: &cri::Device) -> Result<LinuxDevice, Error> {
    let (major, minor) = known(device)?;
    let path = if device.container_path.is_empty() { &device.host_path } else { &device.container_path };
    let node = LinuxDeviceBuilder::default().path(path).typ(LinuxDeviceType::C).major(major).minor(minor);
    Ok(node.file_mode(0o666_u32).uid(0_u32).gid(0_u32).build()?)
}

/// The rule that lets the container use a device with the permissions that are asked for.
pub(super) fn rule(device: &LinuxDevice, asked: &cri::Device) -> Result<LinuxDeviceCgroup, Error> {
    let access = &asked.permissions;
    if access.is_empty() || !access.chars().all(|letter| "rwm".contains(letter)) {
        return Err(Error::Invalid(format!(
            "permissions `{access}` of device `{}` must be some of r, w and m",
            asked.host_path
        )));
    }
    let rule = LinuxDeviceCgroupBuilder::default().allow(true).typ(device.typ());
    Ok(rule.major(device.major()).minor(device.minor()).access(access).build()?)
}

fn known(device: &cri::Device) -> Result<(i64, i64), Error> {
    let found = DEVICES.iter().find(|(path, ..)| *path == device.host_path);
    found.map(|&(_, major, minor)| (major, minor)).ok_or_else(|| {
        let known: Vec<_> = DEVICES.iter().map(|(path, ..)| *path).collect();
        Error::Invalid(format!(
            "device `{}` is the host's, and a pod in a virtual machine has its own: possible are {}",
            device.host_path,
            known.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(host_path: &str, permissions: &str) -> Result<(LinuxDevice, LinuxDeviceCgroup), Error> {
        let device = cri::Device {
            host_path: host_path.into(),
            container_path: String::new(),
            permissions: permissions.into(),
        };
        let (mut devices, mut rules) = super::asked(&[device])?;
        Ok((devices.remove(0), rules.remove(0)))
    }

    #[test]
    fn what_every_machine_has_is_had() {
        let (node, rule) = asked("/dev/fuse", "rw").unwrap();
        assert_eq!((node.path().to_str(), node.major(), node.minor()), (Some("/dev/fuse"), 10, 229));
        assert_eq!((rule.allow(), rule.access().as_deref()), (true, Some("rw")));
    }

    #[test]
    fn hardware_is_refused_by_name() {
        for (path, permissions, word) in [
            ("/dev/sda", "rwm", "/dev/sda"),
            ("/dev/kvm", "rw", "/dev/fuse"),
            ("/dev/null", "x", "`x`"),
            ("/dev/null", "", "permissions"),
        ] {
            let error = asked(path, permissions).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
