//! CDI files: what a vendor says that a container needs for a device.
//!
//! A key that is not known here is an error: dropped, it would be missed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use husk_base::text_file;
use serde::Deserialize;

/// Most bytes of one file.
const MAX_BYTES: u64 = 4 << 20;

/// The versions of the specification that are understood, by their beginnings.
const VERSIONS: [&str; 3] = ["0.", "1.0.", "1.1."];

/// One file: all devices of a kind, or some.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    cdi_version: String,
    /// `vendor.com/class`.
    pub kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    /// For every container that has one of the devices.
    #[serde(default)]
    pub container_edits: Edits,
    /// What can be asked for.
    pub devices: Vec<Device>,
}

/// One device.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// What follows the `=` of its full name.
    pub name: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    /// For each container that has it.
    #[serde(default)]
    pub container_edits: Edits,
}

/// What changes in a container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Edits {
    /// Variables, `NAME=value`.
    pub env: Vec<String>,
    /// Device nodes.
    pub device_nodes: Vec<Node>,
    /// The host's files.
    pub mounts: Vec<Mount>,
    /// Programs that run at stages of its life.
    pub hooks: Vec<Hook>,
    /// Groups that its user is in.
    #[serde(alias = "additionalGIDs")]
    pub additional_gids: Vec<u32>,
}

/// A device node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Node {
    /// Where it is in the container.
    pub path: String,
    /// Where it is on the host; empty for the same.
    pub host_path: String,
    /// `b`, `c`, `u` or `p`; empty for the host's.
    pub r#type: String,
    /// Its number, if it is not to be the host's.
    pub major: Option<i64>,
    /// Its number, if it is not to be the host's.
    pub minor: Option<i64>,
    /// Who may do what with it.
    pub file_mode: Option<u32>,
    /// Of `r`, `w` and `m`; empty for all.
    pub permissions: String,
    /// Its owner.
    pub uid: Option<u32>,
    /// Its group.
    pub gid: Option<u32>,
}

/// A file or directory of the host.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    /// Where it is on the host.
    pub host_path: String,
    /// Where it is in the container.
    pub container_path: String,
    /// As mount(8) has them.
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
    /// When it runs.
    pub hook_name: String,
    /// The program.
    pub path: PathBuf,
    /// Its arguments, its own name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its variables.
    #[serde(default)]
    pub env: Vec<String>,
    /// Most seconds that it may take.
    #[serde(default)]
    pub timeout: Option<u32>,
}

/// The files of a directory, by name: what is in each, or what is wrong with it.
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

/// YAML, of which JSON is a part.
pub fn parse(text: &str) -> Result<Spec, String> {
    let spec: Spec = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
    if !VERSIONS.iter().any(|version| spec.cdi_version.starts_with(version)) {
        return Err(format!("cdiVersion {} is not known", spec.cdi_version));
    }
    Ok(spec)
}
