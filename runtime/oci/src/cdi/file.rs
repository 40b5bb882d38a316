//! CDI files, in which a vendor describes the needs of a container for a device.
//!
//! An unknown key is an error, because a container without that part would fail later.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use husk_base::text_file;
use serde::Deserialize;

/// The longest file that is read, bytes.
const MAX_BYTES: u64 = 4 << 20;

/// The versions of the specification that are understood, by their prefixes.
const VERSIONS: [&str; 3] = ["0.", "1.0.", "1.1."];

/// A file with all devices of a kind, or some.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    cdi_version: String,
    /// The kind, for example `vendor.com/class`.
    pub kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    /// The edits of every container that has one of the devices.
    #[serde(default)]
    pub container_edits: Edits,
    /// The devices that can be asked for.
    pub devices: Vec<Device>,
}

/// A device that can be asked for.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// The part of the device's full name after the `=`.
    pub name: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    /// The edits of every container that has the device.
    #[serde(default)]
    pub container_edits: Edits,
}

/// Changes of a container's configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Edits {
    /// Variables of the environment, `NAME=value`.
    pub env: Vec<String>,
    /// Device nodes.
    pub device_nodes: Vec<Node>,
    /// Files and directories of the host.
    pub mounts: Vec<Mount>,
    /// Programs that run at stages of the container's life.
    pub hooks: Vec<Hook>,
    /// Supplementary groups of the container's process.
    #[serde(alias = "additionalGIDs")]
    pub additional_gids: Vec<u32>,
}

/// A device node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Node {
    /// The path in the container.
    pub path: String,
    /// The path on the host; empty for the same path.
    pub host_path: String,
    /// The type, `b`, `c`, `u` or `p`; empty for the host's type.
    pub r#type: String,
    /// The major number; `None` for the host's.
    pub major: Option<i64>,
    /// The minor number; `None` for the host's.
    pub minor: Option<i64>,
    /// The mode of the node.
    pub file_mode: Option<u32>,
    /// The permissions, of `r`, `w` and `m`; empty for all.
    pub permissions: String,
    /// The owner.
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
}

/// A file or directory of the host.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    /// The path on the host.
    pub host_path: String,
    /// The path in the container.
    pub container_path: String,
    /// The options of mount(8).
    #[serde(default)]
    pub options: Vec<String>,
    /// The kind of file system; empty for a bind mount.
    #[serde(default)]
    pub r#type: String,
}

/// A hook of the OCI runtime-spec.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    /// The stage at which the hook runs.
    pub hook_name: String,
    /// The program.
    pub path: PathBuf,
    /// The program's arguments, its own name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// The program's environment.
    #[serde(default)]
    pub env: Vec<String>,
    /// The longest time that the program may take, seconds.
    #[serde(default)]
    pub timeout: Option<u32>,
}

/// The files of a directory, by name: the content of each, or the reason for which it cannot be
/// used.
pub fn all_in(dir: &Path) -> Vec<(PathBuf, Result<Spec, String>)> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|kind| kind == "json" || kind == "yaml"));
    paths.sort();
    let read = |path: PathBuf| {
        let spec = text_file::read(&path, MAX_BYTES)
            .map_err(|error| error.to_string())
            .and_then(|text| parse(&text));
        (path, spec)
    };
    paths.into_iter().map(read).collect()
}

/// Parses YAML, of which JSON is a part.
pub fn parse(text: &str) -> Result<Spec, String> {
    let spec: Spec = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
    if !VERSIONS.iter().any(|version| spec.cdi_version.starts_with(version)) {
        return Err(format!("cdiVersion {} is not known", spec.cdi_version));
    }
    Ok(spec)
}
