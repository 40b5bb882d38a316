//! What is different for a container on the host. Its configuration is made as
//! for a machine and then moved: places of the machine are in the pod's
//! directory, its control group is below the pod's, and what a machine keeps
//! from a container, the host's own directories and devices, it gets directly.

use std::path::{Path, PathBuf};

use husk_proto::agent::paths;
use husk_proto::cri;
use oci_spec::runtime::{LinuxCpu, LinuxResources, Spec};

use crate::host_namespaces::host_ipc;
use crate::{Error, Input, user_namespace};

mod binds;
mod devices;

/// Where things of a host pod are.
#[derive(Debug)]
pub struct HostPod {
    /// Its supervisor's directory.
    pub directory: PathBuf,
    /// Its control group, below `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
}

/// Moves a machine's configuration to the host.
pub(super) fn adapt(spec: &mut Spec, pod: &HostPod, input: &Input<'_>) -> Result<(), Error> {
    let shm = if host_ipc(input.sandbox) { Some("/dev/shm") } else { None };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let Some(source) = mount.source().clone() else { continue };
        // Bound, where the pod has a user namespace: that of the host shows the host's network.
        let source = if source == Path::new("/sys") { paths::SYS.into() } else { source };
        match shm.filter(|_| source == Path::new(paths::SHM)) {
            Some(shm) => mount.set_source(Some(shm.into())),
            None => mount.set_source(Some(moved(&source, pod))),
        };
    }
    let propagation = binds::add(&mut mounts, &input.config.mounts, input.image_volumes)?;
    spec.set_mounts(Some(mounts));
    if let Some(process) = spec.process_mut() {
        // As the daemon has them: more may be more than it may give.
        process.set_rlimits(None);
    }

    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    if let Some(users) = user_namespace::of_pod(input.sandbox)? {
        // runc before 1.2 wants to be told what a namespace that it joins has.
        linux.set_uid_mappings(Some(user_namespace::mappings(&users.uids)?));
        linux.set_gid_mappings(Some(user_namespace::mappings(&users.gids)?));
    }
    if propagation.is_some() {
        linux.set_rootfs_propagation(propagation);
    }
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        if let Some(path) = namespace.path().clone() {
            namespace.set_path(Some(moved(&path, pod)));
        }
    }
    let group = pod.cgroup.strip_prefix("/sys/fs/cgroup").unwrap_or(&pod.cgroup);
    linux.set_cgroups_path(Some(Path::new("/").join(group).join(input.id.as_str())));
    let resources = linux.resources_mut().get_or_insert_default();
    let asked = input.config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    if let Some(asked) = asked {
        choose_cpus(resources, asked);
    }
    let (devices, rules) = devices::asked(&input.config.devices)?;
    resources.devices_mut().get_or_insert_default().extend(rules);
    if !devices.is_empty() {
        linux.set_devices(Some(devices));
    }
    Ok(())
}

/// On the host a container itself has the CPUs and memory nodes that it names.
pub fn choose_cpus(resources: &mut LinuxResources, asked: &cri::LinuxContainerResources) {
    if asked.cpuset_cpus.is_empty() && asked.cpuset_mems.is_empty() {
        return;
    }
    let mut cpu: LinuxCpu = resources.cpu().clone().unwrap_or_default();
    let given = |list: &str| (!list.is_empty()).then(|| list.to_owned());
    cpu.set_cpus(given(&asked.cpuset_cpus));
    cpu.set_mems(given(&asked.cpuset_mems));
    resources.set_cpu(Some(cpu));
}

/// A place of the machine, where it is on the host.
fn moved(path: &Path, pod: &HostPod) -> PathBuf {
    match path.strip_prefix(paths::BASE) {
        Ok(below) => pod.directory.join(below),
        Err(_) => path.to_owned(),
    }
}

#[cfg(test)]
mod tests;
