//! The filesystems that every container has, and its volumes.

use std::path::Path;

use husk_proto::agent::{OWN_DIRECTORY, paths};
use husk_proto::cri::{self, NamespaceMode};
use oci_spec::runtime::{Mount, MountBuilder};

use super::{Error, Input, declared};

/// `mapped` says that the container is in a user namespace. The machine's
/// network does not belong to that, so `/sys`, which shows it, can only be
/// shown, not mounted anew (sysfs(5), user_namespaces(7)).
pub(super) fn build(
    input: &Input<'_>,
    security: &cri::LinuxContainerSecurityContext,
    mapped: bool,
) -> Result<Vec<Mount>, Error> {
    // A privileged container may write the kernel's files: its own machine's.
    let access = if security.privileged { "rw" } else { "ro" };
    let files = if security.readonly_rootfs { "ro" } else { "rw" };
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        MountBuilder::default()
            .destination(destination)
            .typ(kind)
            .source(source)
            .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
            .build()
    };
    let sys = if mapped {
        mount("/sys", "bind", "/sys", &["rbind", "rprivate", "nosuid", "noexec", "nodev", access])?
    } else {
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access])?
    };
    let options = security.namespace_options.clone().unwrap_or_default();
    let shm = if options.ipc == NamespaceMode::Container as i32 {
        let options = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"];
        mount("/dev/shm", "tmpfs", "shm", &options)?
    } else {
        mount("/dev/shm", "bind", paths::SHM, &["rbind", "nosuid", "noexec", "nodev", "rw"])?
    };
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        shm,
        sys,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access])?,
        mount("/etc/hosts", "bind", paths::HOSTS, &["rbind", "rprivate", files])?,
        mount("/etc/hostname", "bind", paths::HOSTNAME, &["rbind", "rprivate", files])?,
        mount("/etc/resolv.conf", "bind", paths::RESOLV_CONF, &["rbind", "rprivate", files])?,
    ];
    let mut added = Vec::with_capacity(input.volumes.len() + input.image_volumes.len());
    for place in declared::wanted(input.image, &input.config.mounts)? {
        // What every container has at a place is what belongs there.
        if mounts.iter().all(|own| *own.destination() != place) {
            let options = ["rbind", "rprivate", "rw"];
            added.push(mount(&place.to_string_lossy(), "bind", OWN_DIRECTORY, &options)?);
        }
    }
    for volume in input.volumes {
        let folder = if volume.live { paths::LIVE } else { paths::SHARED };
        let source = format!("{folder}/{}", volume.name);
        let access = if volume.read_only_inside { "ro" } else { "rw" };
        let target = volume.container_path.to_string_lossy();
        let more = volume.options.iter().map(String::as_str);
        let options: Vec<_> = ["rbind", "rprivate", access].into_iter().chain(more).collect();
        added.push(mount(&target, "bind", &source, &options)?);
    }
    for image in input.image_volumes {
        let target = image.container_path.to_string_lossy();
        // The agent knows the source. As Kubernetes says: nothing in it can be executed.
        let options = ["bind", "rprivate", "ro", "nosuid", "nodev", "noexec"];
        added.push(mount(&target, "bind", "image", &options)?);
    }
    // A volume in the place of one of ours is what the client wants there.
    mounts.retain(|own| added.iter().all(|mount| mount.destination() != own.destination()));
    // What lies below another comes after it; the client's order, else.
    added.sort_by_key(|mount| mount.destination().components().count());
    mounts.extend(added);
    Ok(mounts)
}

/// The agent makes the mount's source.
pub(super) fn is_own_directory(mount: &Mount) -> bool {
    mount.source().as_deref() == Some(Path::new(OWN_DIRECTORY))
}
