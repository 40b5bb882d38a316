//! `[handlers.NAME.hooks]`: hooks of the OCI runtime-spec.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Hooks of every container of a handler, by the stage at which they run. They run where the
/// container is. For a guest their programs are files of the host, linked statically; those of
/// `start_container` are always the container's own files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Hooks {
    /// Run before the container's namespaces are set up; deprecated by the spec.
    pub prestart: Vec<Hook>,
    /// Run at the same time, in the namespaces of the machine.
    pub create_runtime: Vec<Hook>,
    /// Run at the same time, in the namespaces of the container.
    pub create_container: Vec<Hook>,
    /// Run before the container's program, inside the container.
    pub start_container: Vec<Hook>,
    /// Run after the container's program has started.
    pub poststart: Vec<Hook>,
    /// Run after the container has been deleted: by its client, or by the end of its
    /// pod, where all of them together have 20 seconds.
    pub poststop: Vec<Hook>,
}

impl Hooks {
    /// The hooks of all stages.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Hook> {
        let lists = [
            &self.prestart,
            &self.create_runtime,
            &self.create_container,
            &self.start_container,
            &self.poststart,
            &self.poststop,
        ];
        lists.into_iter().flatten()
    }
}

/// A hook.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Hook {
    /// The absolute path of the program.
    pub path: PathBuf,
    /// The program's arguments, its own name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// The program's environment, `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// The longest time that the program may take, seconds.
    #[serde(default)]
    pub timeout_seconds: Option<u32>,
}
