//! The filesystems that every container has, volumes aside.

use husk_proto::agent::paths;
use husk_proto::cri;
use oci_spec::runtime::{Mount, MountBuilder};

use super::Error;

pub(super) fn build(security: &cri::LinuxContainerSecurityContext) -> Result<Vec<Mount>, Error> {
    // A privileged container may write the kernel's files: its own machine's.
    let access = if security.privileged { "rw" } else { "ro" };
    let files = if security.readonly_rootfs && !security.privileged { "ro" } else { "rw" };
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        MountBuilder::default()
            .destination(destination)
            .typ(kind)
            .source(source)
            .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
            .build()
    };
    Ok(vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        mount("/dev/shm", "bind", paths::SHM, &["rbind", "nosuid", "noexec", "nodev", "rw"])?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access])?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access])?,
        mount("/etc/hosts", "bind", paths::HOSTS, &["rbind", "rprivate", files])?,
        mount("/etc/hostname", "bind", paths::HOSTNAME, &["rbind", "rprivate", files])?,
        mount("/etc/resolv.conf", "bind", paths::RESOLV_CONF, &["rbind", "rprivate", files])?,
    ])
}
