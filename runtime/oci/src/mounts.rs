//! The file systems that every container has, and its volumes.

use std::path::Path;

use husk_proto::agent::{OWN_DIRECTORY, paths};
use husk_proto::cri::{self, NamespaceMode};
use oci_spec::runtime::{Mount, MountBuilder};

use super::{Error, Input, declared};

/// The paths that all containers of a pod share, also below a mount of the client's.
const OF_THE_POD: [&str; 4] = ["/dev/shm", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// The mounts of a container. `mapped` says that the container is in a user namespace. The
/// guest's network does not belong to that, so `/sys`, which shows the network, can only be
/// bound, not mounted anew (sysfs(5), user_namespaces(7)).
pub(super) fn build(
    input: &Input<'_>,
    security: &cri::LinuxContainerSecurityContext,
    mapped: bool,
) -> Result<Vec<Mount>, Error> {
    // A privileged container may write the files of its guest's kernel.
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
    let mounts = vec![
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
        // The mounts of every container come before the image's declared volumes.
        if mounts.iter().all(|own| *own.destination() != place) {
            let options = ["rbind", "rprivate", "rw"];
            added.push(mount(&place.to_string_lossy(), "bind", OWN_DIRECTORY, &options)?);
        }
    }
    for volume in input.volumes {
        let folder = if volume.synced { paths::SYNCED } else { paths::SHARED };
        let source = format!("{folder}/{}", volume.name);
        let access = if volume.read_only_inside { "ro" } else { "rw" };
        let target = volume.container_path.to_string_lossy();
        let more = volume.options.iter().map(String::as_str);
        let options: Vec<_> = ["rbind", "rprivate", access].into_iter().chain(more).collect();
        added.push(mount(&target, "bind", &source, &options)?);
    }
    for image in input.image_volumes {
        let target = image.container_path.to_string_lossy();
        // The agent adds the source. As in Kubernetes, no file of an image volume can be executed.
        let options = ["bind", "rprivate", "ro", "nosuid", "nodev", "noexec"];
        added.push(mount(&target, "bind", "image", &options)?);
    }
    Ok(merge(mounts, added))
}

/// The mounts that every container has, with those that are `added` for its
/// client. A mount of the client's replaces one of ours at the same path, and
/// a `/dev` of the client's all of ours below it.
pub(super) fn merge(mut own: Vec<Mount>, mut added: Vec<Mount>) -> Vec<Mount> {
    let is_added = |place: &Path| added.iter().any(|mount| mount.destination() == place);
    let dev = Path::new("/dev");
    let has_dev = is_added(dev);
    own.retain(|mount| !is_added(mount.destination()));
    let of_the_pod = |mount: &Mount| OF_THE_POD.iter().any(|place| mount.destination() == Path::new(place));
    added.extend(own.extract_if(.., |mount| of_the_pod(mount)));
    own.retain(|mount| !(has_dev && mount.destination().starts_with(dev)));
    // A mount below another comes after it; otherwise the client's order holds.
    added.sort_by_key(|mount| mount.destination().components().count());
    own.extend(added);
    own
}

/// Whether the agent makes the mount's source.
pub(super) fn is_own_directory(mount: &Mount) -> bool {
    mount.source().as_deref() == Some(Path::new(OWN_DIRECTORY))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(own: &[&str], added: &[&str]) -> Vec<String> {
        let mounts = |places: &[&str], source: &str| {
            let mount = |place: &&str| MountBuilder::default().destination(*place).source(source).build();
            places.iter().map(mount).collect::<Result<Vec<_>, _>>().unwrap()
        };
        let merged = merge(mounts(own, "own"), mounts(added, "client"));
        let place = |mount: &Mount| {
            let source = mount.source().as_ref().unwrap().display();
            format!("{source}:{}", mount.destination().display())
        };
        merged.iter().map(place).collect()
    }

    const OWN: &[&str] = &["/proc", "/dev", "/dev/pts", "/dev/shm", "/sys", "/etc/hosts", "/etc/resolv.conf"];

    #[test]
    fn the_pods_files_are_in_a_directory_of_the_clients() {
        assert_eq!(
            places(OWN, &["/etc/x/y", "/etc", "/etc/hosts/"]),
            [
                "own:/proc",
                "own:/dev",
                "own:/dev/pts",
                "own:/sys",
                "client:/etc",
                "client:/etc/hosts/",
                "own:/dev/shm",
                "own:/etc/resolv.conf",
                "client:/etc/x/y",
            ]
        );
    }

    #[test]
    fn a_dev_of_the_clients_has_its_own_below_but_the_pods_memory() {
        let merged = places(OWN, &["/dev"]);
        let dev: Vec<_> = merged.iter().filter(|place| place.contains("/dev")).collect();
        assert_eq!(dev, ["client:/dev", "own:/dev/shm"]);
        assert!(places(OWN, &["/dev/x", "/devices"]).contains(&"own:/dev/pts".to_owned()));
    }
}
