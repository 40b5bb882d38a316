//! The differences of a container on the host. The configuration is made as
//! for a VM and then changed: the guest's paths are moved to the pod's
//! directory, the control group is below the pod's, and the container gets the
//! host's own directories and devices, which a VM keeps from it.

use std::path::{Path, PathBuf};

use husk_proto::agent::paths;
use husk_proto::cri;
use oci_spec::runtime::{LinuxCpu, LinuxResources, Spec};

use crate::host_namespaces::host_ipc;
use crate::{Error, Input, user_namespace};

mod binds;
mod devices;

/// The paths of a host pod.
#[derive(Debug)]
pub struct HostPod {
    /// The supervisor's directory.
    pub directory: PathBuf,
    /// The pod's control group, below `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
}

/// Changes a VM's configuration into one for the host.
pub(super) fn adapt(spec: &mut Spec, pod: &HostPod, input: &Input<'_>) -> Result<(), Error> {
    let shm = if host_ipc(input.sandbox) { Some("/dev/shm") } else { None };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let Some(source) = mount.source().clone() else { continue };
        // With a user namespace `/sys` is a bind of the pod's: the host's own shows the host's network.
        let source = if source == Path::new("/sys") { paths::SYS.into() } else { source };
        match shm.filter(|_| source == Path::new(paths::SHM)) {
            Some(shm) => mount.set_source(Some(shm.into())),
            None => mount.set_source(Some(moved(&source, pod))),
        };
    }
    let propagation = binds::add(&mut mounts, &input.config.mounts, input.image_volumes)?;
    spec.set_mounts(Some(mounts));
    if let Some(process) = spec.process_mut() {
        // The container inherits huskd's limits, because huskd may not be allowed to raise them.
        process.set_rlimits(None);
    }

    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    if let Some(users) = user_namespace::of_pod(input.sandbox)? {
        // runc before 1.2 needs the mappings of a namespace that it joins.
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

/// Adds the CPUs and memory nodes that a container asks for: on the host its own control group
/// has them.
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

/// The path on the host of a path in the guest.
fn moved(path: &Path, pod: &HostPod) -> PathBuf {
    match path.strip_prefix(paths::BASE) {
        Ok(below) => pod.directory.join(below),
        Err(_) => path.to_owned(),
    }
}

#[cfg(test)]
mod tests;
