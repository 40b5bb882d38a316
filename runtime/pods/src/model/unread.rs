//! Records that this huskd cannot use: they are damaged, or a later release wrote
//! them. What they speak of may well live, so it is left alone: its machine is not
//! ended, and its name and id stay taken, so that no client makes it a second time.

use std::path::{Path, PathBuf};

use husk_base::id::SandboxId;
use husk_base::record::{self, ReadError, Salvaged};
use husk_proto::cri;
use husk_volumes::ImageVolume;
use serde::Deserialize;
use serde_json::Value;

use super::names;

/// A pod or container whose record cannot be used.
#[derive(Clone, Debug)]
pub struct Unread {
    /// "sandbox" or "container".
    pub what: &'static str,
    /// The id of the pod or container.
    pub id: String,
    /// The pod of a container.
    pub sandbox: Option<SandboxId>,
    /// Where the record is.
    pub path: PathBuf,
    /// The reason for which the record cannot be used.
    pub why: String,
    /// The name that it holds, if that could be told.
    pub name: Option<String>,
    /// The disks of the images that a container uses, if they could be told.
    pub disks: Option<Vec<(String, PathBuf)>>,
}

impl Unread {
    /// A pod whose record at `path` cannot be used.
    #[must_use]
    pub fn sandbox(id: &str, path: &Path, why: &str) -> Self {
        let metadata = salvaged::<cri::PodSandboxMetadata>(path);
        let named = |metadata| cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
        Self {
            what: "sandbox",
            id: id.to_owned(),
            sandbox: None,
            path: path.into(),
            why: why.to_owned(),
            name: metadata.map(|metadata| names::sandbox(&named(metadata))),
            disks: None,
        }
    }

    /// A container of `sandbox` whose record at `path` cannot be used.
    #[must_use]
    pub fn container(
        id: &str,
        sandbox: (&SandboxId, &cri::PodSandboxConfig),
        path: &Path,
        why: &ReadError,
    ) -> Self {
        let metadata = salvaged::<cri::ContainerMetadata>(path);
        let named = |metadata| cri::ContainerConfig { metadata: Some(metadata), ..Default::default() };
        let (sandbox, pod) = sandbox;
        Self {
            what: "container",
            id: id.to_owned(),
            sandbox: Some(sandbox.clone()),
            path: path.into(),
            why: why.to_string(),
            name: metadata.map(|metadata| names::container(&named(metadata), pod)),
            disks: disks(path),
        }
    }

    /// All containers of `sandbox`, when not even their records can be found.
    #[must_use]
    pub fn containers(sandbox: &SandboxId, folder: &Path, why: &std::io::Error) -> Self {
        Self {
            what: "container",
            id: format!("of {sandbox}"),
            sandbox: Some(sandbox.clone()),
            path: folder.into(),
            why: why.to_string(),
            name: None,
            disks: None,
        }
    }

    /// Logs that the record does not read, and keeps a copy of the record beside it. This blocks.
    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    pub fn tell(&self) {
        if self.path.is_file()
            && let Err(error) = record::keep_bad(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "failed to copy a record that does not read");
        }
        tracing::error!(
            id = self.id,
            path = %self.path.display(),
            why = self.why,
            "the record of a {} does not read: it is left alone, and its name stays taken{}",
            self.what,
            if self.name.is_some() { "" } else { ", as far as it is known" },
        );
    }

    /// Tells a client what has become of the pod or container, and the way out.
    #[must_use]
    pub fn advice(&self) -> String {
        let (what, path, why) = (self.what, self.path.display(), &self.why);
        let give_up = match (&self.sandbox, self.path.parent()) {
            (Some(sandbox), _) => format!("remove its pod `{sandbox}`"),
            (None, Some(folder)) => {
                format!("remove the folder {} and restart huskd, which then ends the pod", folder.display())
            }
            (None, None) => "end the pod".to_owned(),
        };
        format!(
            "its record {path} does not read: {why}. The {what} is left alone. To have it back, mend the record, or \
             install the release that wrote it, and restart huskd; to give it up, {give_up}"
        )
    }
}

/// Reads the name of a pod or container from a record that does not read as a whole.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn salvaged<T: for<'a> Deserialize<'a> + Default + PartialEq>(path: &Path) -> Option<T> {
    let metadata = match record::salvage(path, "metadata")? {
        Salvaged::Whole(record) => record.pointer("/config/metadata")?.clone(),
        Salvaged::Part(metadata) => metadata,
    };
    // Fields have defaults: something else must not pass for a name.
    T::deserialize(metadata).ok().filter(|metadata| *metadata != T::default())
}

/// Reads from such a record which slots of its machine a container has filled.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn disks(path: &Path) -> Option<Vec<(String, PathBuf)>> {
    let Salvaged::Whole(record) = record::salvage(path, "image_slot")? else { return None };
    let text = |name: &str| record.get(name).and_then(Value::as_str).map(str::to_owned);
    let mut disks = vec![(text("image_slot")?, PathBuf::from(text("image_rootfs")?))];
    let volumes = record.get("image_volumes").cloned().unwrap_or_else(|| Value::Array(Vec::new()));
    let volumes: Vec<ImageVolume> = serde_json::from_value(volumes).ok()?;
    disks.extend(volumes.into_iter().map(|volume| (volume.slot, volume.rootfs)));
    Some(disks)
}
