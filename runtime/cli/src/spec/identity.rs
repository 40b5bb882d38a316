//! Flags that say what a container is called, and where it comes from and goes to.

use std::path::PathBuf;

use anyhow::bail;
use husk_proto::cri;

use super::{Plan, name, pairs};
use crate::labels;

/// When an image is pulled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Pull {
    /// When the node does not have it.
    #[default]
    Missing,
    /// Every time: the registry's image may be newer.
    Always,
    /// Never: the node has it, or the command fails.
    Never,
}

/// Names, labels, image, handler.
#[derive(Clone, Debug, clap::Args)]
pub struct Identity {
    /// The container's name; without it, one is made up.
    #[arg(long)]
    pub name: Option<String>,
    /// Add a label to the container.
    #[arg(short, long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Add an annotation to the container and its pod.
    #[arg(long, value_name = "KEY=VALUE")]
    annotation: Vec<String>,
    /// Put the container into this pod, instead of one of its own.
    #[arg(long, value_name = "POD")]
    pub pod: Option<String>,
    /// The runtime handler: the configuration's default unless given; `runc` for a container of the host.
    #[arg(long)]
    pub handler: Option<String>,
    /// When the image is pulled.
    #[arg(long, value_enum, default_value_t)]
    pub pull: Pull,
    /// The platform of the image; it has to be this machine's.
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    /// Write the container's id to this file, which must not exist.
    #[arg(long, value_name = "FILE")]
    pub cidfile: Option<PathBuf>,
}

impl Identity {
    pub(super) fn apply(&self, plan: &mut Plan) -> anyhow::Result<()> {
        if let Some(platform) = &self.platform {
            is_this_machine(platform)?;
        }
        if let Some(file) = &self.cidfile
            && file.exists()
        {
            bail!("--cidfile: {} exists already: remove it, or name another file", file.display());
        }
        plan.name = match &self.name {
            Some(name) => name::check(name)?.to_owned(),
            None => name::made_up()?,
        };
        plan.container.metadata = Some(cri::ContainerMetadata { name: plan.name.clone(), attempt: 0 });
        plan.container.labels = pairs(&self.label).collect();
        plan.container.labels.insert(labels::NAME.to_owned(), plan.name.clone());
        plan.container.annotations = pairs(&self.annotation).collect();
        plan.pod.annotations.extend(plan.container.annotations.clone());
        plan.pod.labels.insert(labels::NAME.to_owned(), plan.name.clone());
        // The name is all that makes it this pod: huskd refuses another one.
        plan.pod.metadata = Some(cri::PodSandboxMetadata {
            name: plan.name.clone(),
            uid: plan.name.clone(),
            namespace: labels::NAMESPACE.to_owned(),
            attempt: 0,
        });
        Ok(())
    }
}

/// Refuses a platform that this machine does not run.
fn is_this_machine(platform: &str) -> anyhow::Result<()> {
    let own = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let (os, arch) = platform.split_once('/').unwrap_or(("linux", platform));
    if os != "linux" || arch.split('/').next() != Some(own) {
        bail!("--platform {platform}: this machine runs linux/{own} alone, and Husk emulates no other");
    }
    Ok(())
}
