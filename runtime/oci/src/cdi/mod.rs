//! Devices by name, `vendor.com/class=device`, as the Container Device
//! Interface has them (CDI, `SPEC.md`): a file of the host says which device
//! nodes, mounts, variables and hooks a container needs for each.
//!
//! Here they become part of the client's request, and are then treated
//! as if the client had asked for them. So a container in a VM gets the
//! devices that every guest has, and is refused the host's hardware by name.

use std::path::{Path, PathBuf};

use husk_config as config;
use husk_proto::cri;
use oci_spec::runtime::{LinuxDeviceType, Spec as OciSpec};

mod file;
#[cfg(test)]
mod tests;

use file::{Edits, Hook, Mount, Node, Spec};

/// The prefix of annotations that ask for devices, as older clients do.
const ANNOTATION: &str = "cdi.k8s.io/";

/// A device that a container cannot have, by its name or its node.
#[derive(Debug, thiserror::Error)]
#[error("CDI device {0}")]
pub struct Error(String);

/// The device nodes that a container gets, for the properties that CRI has no fields for.
#[derive(Debug, Default)]
pub struct Nodes(Vec<Node>);

/// Replaces the names of devices in a request by the devices' edits. Their hooks are appended to
/// `hooks`, which is `None` where programs of the host cannot run.
///
/// # Errors
/// A device that no file has, or that several files of one directory have; an edit that a container
/// cannot have.
pub fn apply(
    config: &mut cri::ContainerConfig,
    dirs: &[PathBuf],
    mut hooks: Option<&mut config::Hooks>,
) -> Result<Nodes, Error> {
    let mut nodes = Nodes::default();
    let names = names(config);
    if names.is_empty() {
        return Ok(nodes);
    }
    let files: Vec<_> = dirs.iter().map(|dir| file::all_in(dir)).collect();
    let mut applied: Vec<&Path> = Vec::new();
    for name in &names {
        let refused = |problem: String| Error(format!("`{name}`: {problem}"));
        let (path, spec, device) = find(&files, name).map_err(|problem| {
            refused(format!(
                "{problem} (looked in {})",
                dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
            ))
        })?;
        let refused = |problem: String| refused(format!("{problem} ({})", path.display()));
        // The edits for all devices of a file are applied once.
        if !applied.contains(&path) {
            applied.push(path);
            edit(config, &mut nodes, hooks.as_deref_mut(), &spec.container_edits).map_err(refused)?;
        }
        edit(config, &mut nodes, hooks.as_deref_mut(), device).map_err(refused)?;
    }
    Ok(nodes)
}

/// The names of devices that are asked for, each once.
fn names(config: &mut cri::ContainerConfig) -> Vec<String> {
    let asked = std::mem::take(&mut config.cdi_devices).into_iter().map(|device| device.name);
    let annotated = config.annotations.iter().filter(|(key, _)| key.starts_with(ANNOTATION));
    let annotated = annotated.flat_map(|(_, names)| names.split(',').map(|name| name.trim().to_owned()));
    let mut names: Vec<String> = Vec::new();
    for name in asked.chain(annotated) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The file that has a device, and the device. A later directory
/// counts more than an earlier one; in one directory only one file may have it.
fn find<'a>(
    files: &'a [Vec<(PathBuf, Result<Spec, String>)>],
    name: &str,
) -> Result<(&'a Path, &'a Spec, &'a Edits), String> {
    let (kind, short) = name.split_once('=').ok_or("the name is not of the form vendor.com/class=device")?;
    for dir in files.iter().rev() {
        let mut found = None;
        for (path, spec) in dir.iter().filter_map(|(path, spec)| Some((path, spec.as_ref().ok()?))) {
            let devices = spec.devices.iter().filter(|device| spec.kind == kind && device.name == short);
            for device in devices {
                if let Some((other, ..)) = found.replace((path.as_path(), spec, &device.container_edits)) {
                    return Err(format!("{} and {} both have it", other.display(), path.display()));
                }
            }
        }
        if let Some(found) = found {
            return Ok(found);
        }
    }
    let unread = files.iter().flatten().filter_map(|(path, spec)| Some((path, spec.as_ref().err()?)));
    let unread: String = unread.map(|(path, error)| format!("; {}: {error}", path.display())).collect();
    Err(format!("no CDI file has it{unread}"))
}

fn edit(
    config: &mut cri::ContainerConfig,
    nodes: &mut Nodes,
    mut hooks: Option<&mut config::Hooks>,
    edits: &Edits,
) -> Result<(), String> {
    for variable in &edits.env {
        let (key, value) =
            variable.split_once('=').ok_or_else(|| format!("`{variable}` is no NAME=value"))?;
        config.envs.retain(|other| other.key != key);
        config.envs.push(cri::KeyValue { key: key.into(), value: value.into() });
    }
    for node in &edits.device_nodes {
        let host_path = if node.host_path.is_empty() { &node.path } else { &node.host_path }.clone();
        let permissions = if node.permissions.is_empty() { "rwm" } else { &node.permissions }.into();
        config.devices.push(cri::Device { container_path: node.path.clone(), host_path, permissions });
        nodes.0.push(node.clone());
    }
    for wanted in &edits.mounts {
        config.mounts.push(mount(wanted)?);
    }
    for hook in &edits.hooks {
        let hooks = hooks.as_deref_mut().ok_or_else(|| {
            format!(
                "its hook {} is a program of the host: name it in the runtime handler's `hooks`, which run in the guest",
                hook.path.display()
            )
        })?;
        add_hook(hooks, hook)?;
    }
    if !edits.additional_gids.is_empty() {
        let security = &mut config.linux.get_or_insert_default().security_context;
        let groups = &mut security.get_or_insert_default().supplemental_groups;
        groups.extend(edits.additional_gids.iter().copied().map(i64::from));
    }
    Ok(())
}

fn mount(wanted: &Mount) -> Result<cri::Mount, String> {
    if !matches!(wanted.r#type.as_str(), "" | "none" | "bind") {
        return Err(format!("a mount of type {} is no file of the host", wanted.r#type));
    }
    let mut mount = cri::Mount {
        host_path: wanted.host_path.clone(),
        container_path: wanted.container_path.clone(),
        ..Default::default()
    };
    for option in &wanted.options {
        match option.as_str() {
            "ro" => mount.readonly = true,
            "slave" | "rslave" => {
                mount.propagation = cri::MountPropagation::PropagationHostToContainer as i32
            }
            "shared" | "rshared" => {
                mount.propagation = cri::MountPropagation::PropagationBidirectional as i32
            }
            // Mounts have these options in any case.
            "rw" | "bind" | "rbind" | "private" | "rprivate" => {}
            other => mount.mount_options.push(other.into()),
        }
    }
    Ok(mount)
}

fn add_hook(hooks: &mut config::Hooks, hook: &Hook) -> Result<(), String> {
    let list = match hook.hook_name.as_str() {
        "prestart" => &mut hooks.prestart,
        "createRuntime" => &mut hooks.create_runtime,
        "createContainer" => &mut hooks.create_container,
        "startContainer" => &mut hooks.start_container,
        "poststart" => &mut hooks.poststart,
        "poststop" => &mut hooks.poststop,
        other => return Err(format!("there is no hook `{other}`")),
    };
    let Hook { path, args, env, timeout, .. } = hook.clone();
    list.push(config::Hook { path, args, env, timeout_seconds: timeout });
    Ok(())
}

impl Nodes {
    /// Gives device nodes the owner and mode that their file says.
    ///
    /// # Errors
    /// A node that is another device on this host than the file says.
    pub fn finish(&self, spec: &mut OciSpec) -> Result<(), Error> {
        let devices = spec.linux_mut().as_mut().and_then(|linux| linux.devices_mut().as_mut());
        for device in devices.into_iter().flatten() {
            let Some(node) = self.0.iter().find(|node| Path::new(&node.path) == device.path()) else {
                continue;
            };
            let kind = match node.r#type.as_str() {
                "" => device.typ(),
                "b" => LinuxDeviceType::B,
                "c" => LinuxDeviceType::C,
                "u" => LinuxDeviceType::U,
                _ => LinuxDeviceType::P,
            };
            let said = (kind, node.major.unwrap_or(device.major()), node.minor.unwrap_or(device.minor()));
            let is = (device.typ(), device.major(), device.minor());
            if said != is && (said.0, is.0) != (LinuxDeviceType::U, LinuxDeviceType::C) {
                return Err(Error(format!(
                    "node {} is {} {}:{} here, and something else in its CDI file",
                    node.path,
                    is.0.as_str(),
                    is.1,
                    is.2
                )));
            }
            if let Some(mode) = node.file_mode {
                device.set_file_mode(Some(mode));
            }
            if let Some(uid) = node.uid {
                device.set_uid(Some(uid));
            }
            if let Some(gid) = node.gid {
                device.set_gid(Some(gid));
            }
        }
        Ok(())
    }
}
