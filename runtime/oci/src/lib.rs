//! The OCI runtime configuration of a container, made from its client's request
//! and its image's configuration (OCI runtime-spec, `config.md`); and the parts of the host that a
//! request names: devices ([`cdi`]) and profiles ([`apparmor`]).
//!
//! No code here knows a running pod: it makes a configuration of its input alone.
//!
//! Every path in a configuration is a path in the guest. Two values are left to the agent,
//! because only the guest may look into a container's files: `root.path`, and
//! the numeric ids of a user that is given by name.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use husk_base::id::ContainerId;
use husk_config::Hooks;
use husk_proto::agent::paths;
use husk_proto::cri::{self, NamespaceMode};
use husk_volumes::ImageVolume;
use husk_volumes::Volume;
use oci_spec::OciSpecError;
use oci_spec::image::Config as ImageConfig;
use oci_spec::runtime::{
    Linux, LinuxBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, RootBuilder, Spec,
    SpecBuilder,
};

pub mod apparmor;
pub mod cdi;
mod declared;
mod devices;
pub mod hooks;
mod host;
mod host_name;
mod host_namespaces;
mod mounts;
mod process;
mod resources;
mod seccomp;
mod user_namespace;

pub use host::{HostPod, choose_cpus};
pub use host_name::host_name;
pub use host_namespaces::{host_ipc, host_network};
pub use process::user;
pub use resources::{limits as resource_limits, oom_score_adj};
pub use user_namespace::of_pod as user_namespace;

/// The request cannot be turned into a container.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense.
    #[error("container configuration: {0}")]
    Invalid(String),
    /// The OCI configuration refused a value.
    #[error("container configuration: {0}")]
    Oci(#[from] OciSpecError),
}

/// The parts that a configuration is made of.
#[derive(Debug)]
pub struct Input<'a> {
    /// The container's id.
    pub id: &'a ContainerId,
    /// The configuration that the client asked for.
    pub config: &'a cri::ContainerConfig,
    /// The client's configuration of the pod.
    pub sandbox: &'a cri::PodSandboxConfig,
    /// The image's configuration.
    pub image: &'a ImageConfig,
    /// The host's files that are mounted in it.
    pub volumes: &'a [Volume],
    /// The images that are mounted in it.
    pub image_volumes: &'a [ImageVolume],
    /// The hooks of the handler.
    pub hooks: &'a Hooks,
    /// The process id, in the guest, of the container whose pid namespace is to be
    /// shared, if the client names one.
    pub target_pid: Option<u32>,
    /// The name of the AppArmor profile. The kernel under which the container runs will have it.
    pub apparmor: Option<&'a str>,
    /// The paths of the pod, for a container on the host.
    pub host: Option<&'a HostPod>,
}

/// Makes the configuration.
///
/// # Errors
/// See [`Error`].
pub fn build(input: &Input<'_>) -> Result<Spec, Error> {
    refuse_unsupported(input)?;
    let security = security(input.config);
    let options = security.namespace_options.clone().unwrap_or_default();
    let user_namespace = user_namespace::of_pod(input.sandbox)?;
    user_namespace::of_container(options.userns_options.as_ref(), user_namespace.as_ref())?;
    let mapped = user_namespace.is_some();
    let spec = SpecBuilder::default()
        .version("1.0.2")
        .root(RootBuilder::default().path("rootfs").readonly(security.readonly_rootfs).build()?)
        .process(process::build(input, &security)?)
        .mounts(mounts::build(input, &security, mapped)?)
        .annotations(annotations(input))
        .linux(linux(input, &security, mapped)?);
    let mut spec = spec.build()?;
    spec.set_hooks(hooks::of_container(input.hooks, input.host.is_some())?);
    // The guest has the pod's host name already. The builder would set a default.
    spec.set_hostname(None);
    if let Some(pod) = input.host {
        host::adapt(&mut spec, pod, input)?;
    }
    user_namespace::map_volumes(&mut spec, &input.config.mounts, user_namespace.as_ref())?;
    Ok(spec)
}

/// The security context, empty when the client gave none.
fn security(config: &cri::ContainerConfig) -> cri::LinuxContainerSecurityContext {
    config.linux.as_ref().and_then(|linux| linux.security_context.clone()).unwrap_or_default()
}

/// Whether the container may do everything in its VM, or on the host.
#[must_use]
pub fn privileged(config: &cri::ContainerConfig) -> bool {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    security.is_some_and(|security| security.privileged)
}

/// Refuses requests that would otherwise be ignored.
fn refuse_unsupported(input: &Input<'_>) -> Result<(), Error> {
    let (config, on_host) = (input.config, input.host.is_some());
    if config.windows.is_some() {
        return Err(Error::Invalid("`windows`: this runtime has Linux containers".into()));
    }
    let security = security(config);
    selinux(security.selinux_options.as_ref())?;
    let namespaces = security.namespace_options.unwrap_or_default();
    shareable(&namespaces, on_host)
}

/// Refuses SELinux labels, which the guest's kernel does not know.
///
/// # Errors
/// There are labels.
pub fn selinux(options: Option<&cri::SeLinuxOption>) -> Result<(), Error> {
    match options {
        Some(label) if *label != cri::SeLinuxOption::default() => {
            Err(Error::Invalid("`selinux_options`: the guest's kernel has no SELinux".into()))
        }
        _ => Ok(()),
    }
}

/// Checks the namespaces of a pod or a container. A host pod can have those of the host as well.
///
/// # Errors
/// The namespace that the pod cannot have.
pub fn shareable(options: &cri::NamespaceOption, on_host: bool) -> Result<(), Error> {
    let all = [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)];
    for (what, mode) in all {
        let mode = NamespaceMode::try_from(mode)
            .map_err(|_| Error::Invalid(format!("unknown mode {mode} of the {what} namespace")))?;
        let possible = match mode {
            NamespaceMode::Pod => true,
            NamespaceMode::Container => what != "network",
            NamespaceMode::Target => what == "pid",
            NamespaceMode::Node if on_host => true,
            NamespaceMode::Node => {
                return Err(Error::Invalid(format!(
                    "the host's {what} namespace is out of reach of a pod in a virtual machine: run it with a \
                     runtime handler of host containers"
                )));
            }
        };
        if !possible {
            return Err(Error::Invalid(format!(
                "mode {} is not one for the {what} namespace",
                mode.as_str_name()
            )));
        }
    }
    Ok(())
}

/// The request's annotations, with the names of the pod and the container as other
/// runtimes add them.
fn annotations(input: &Input<'_>) -> HashMap<String, String> {
    let name =
        |metadata: Option<&cri::ContainerMetadata>| metadata.map(|m| m.name.clone()).unwrap_or_default();
    let pod = input.sandbox.metadata.clone().unwrap_or_default();
    let mut annotations: HashMap<_, _> = input.config.annotations.clone();
    for (key, value) in [
        ("io.kubernetes.cri.container-type", "container".to_owned()),
        ("io.kubernetes.cri.container-name", name(input.config.metadata.as_ref())),
        ("io.kubernetes.cri.sandbox-name", pod.name),
        ("io.kubernetes.cri.sandbox-namespace", pod.namespace),
        ("io.kubernetes.cri.sandbox-uid", pod.uid),
    ] {
        annotations.insert(key.into(), value);
    }
    annotations
}

fn linux(
    input: &Input<'_>,
    security: &cri::LinuxContainerSecurityContext,
    mapped: bool,
) -> Result<Linux, Error> {
    // Devices of the host are added by [`host::adapt`].
    let devices = if input.host.is_some() { &[][..] } else { &input.config.devices };
    let (devices, rules) = devices::asked(devices)?;
    let mut linux = LinuxBuilder::default()
        .cgroups_path(format!("/{}", input.id))
        .namespaces(namespaces(input, security, mapped)?)
        .resources(resources::build(input.config, rules, security.privileged)?)
        .devices(devices);
    if !security.privileged {
        // The kubelet sends the usual paths, and none for `procMount: Unmasked`.
        linux =
            linux.masked_paths(security.masked_paths.clone()).readonly_paths(security.readonly_paths.clone());
        if let Some(profile) = seccomp::build(security)? {
            linux = linux.seccomp(profile);
        }
    } else {
        linux = linux.masked_paths(Vec::<String>::new()).readonly_paths(Vec::<String>::new());
    }
    Ok(linux.build()?)
}

/// The container's namespaces. The guest is the pod: network, IPC and host name are the guest's
/// own, so a container shares them by having no namespace for them.
fn namespaces(
    input: &Input<'_>,
    security: &cri::LinuxContainerSecurityContext,
    mapped: bool,
) -> Result<Vec<LinuxNamespace>, Error> {
    let own = |kind| LinuxNamespaceBuilder::default().typ(kind).build();
    let options = security.namespace_options.clone().unwrap_or_default();
    let pid = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Pid);
    let pid = match NamespaceMode::try_from(options.pid) {
        Ok(NamespaceMode::Container) => Some(pid),
        Ok(NamespaceMode::Pod | NamespaceMode::Node)
            if input.host.is_some() && host_namespaces::host_pid(input.sandbox) =>
        {
            None
        }
        // The agent makes the namespace for the first container that needs it.
        Ok(NamespaceMode::Pod) => Some(pid.path(paths::PID_NAMESPACE)),
        Ok(NamespaceMode::Target) => {
            let target = input.target_pid.ok_or_else(|| {
                Error::Invalid(format!("target container `{}` is not running in this pod", options.target_id))
            })?;
            Some(pid.path(format!("/proc/{target}/ns/pid")))
        }
        Ok(NamespaceMode::Node) | Err(_) => {
            return Err(Error::Invalid(format!("pid namespace mode {}", options.pid)));
        }
    };
    let mut namespaces = vec![own(LinuxNamespaceType::Mount)?];
    if !security.privileged {
        // A privileged container sees all control groups, as with other runtimes.
        namespaces.push(own(LinuxNamespaceType::Cgroup)?);
    }
    if let Some(pid) = pid {
        namespaces.push(pid.build()?);
    }
    if options.ipc == NamespaceMode::Container as i32 {
        namespaces.push(own(LinuxNamespaceType::Ipc)?);
    }
    if mapped {
        let pods = |kind, path: &str| LinuxNamespaceBuilder::default().typ(kind).path(path).build();
        namespaces.push(pods(LinuxNamespaceType::User, paths::USER_NAMESPACE)?);
        if options.ipc != NamespaceMode::Container as i32 {
            namespaces.push(pods(LinuxNamespaceType::Ipc, paths::IPC_NAMESPACE)?);
        }
    }
    Ok(namespaces)
}

/// Whether the pod has one pid namespace for all its containers. This is CRI's
/// default; the kubelet asks for one namespace for each container.
#[must_use]
pub fn shares_pid_namespace(sandbox: &cri::PodSandboxConfig) -> bool {
    sandbox
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.as_ref())
        .is_none_or(|options| options.pid == NamespaceMode::Pod as i32)
}

#[cfg(test)]
mod tests;
