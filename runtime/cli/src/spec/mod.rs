//! Flags of `husk run` and `husk create`, and the CRI requests that they make.
//!
//! Each group of flags is a file, which writes its part of a [`Plan`]. A flag that CRI cannot say
//! is refused with the reason, and never ignored.

use std::path::PathBuf;

use anyhow::Context;
use husk_proto::cri;

mod identity;
mod limits;
mod mount;
mod name;
mod network;
mod port;
mod process;
mod refused;
mod security;
mod storage;
#[cfg(test)]
mod tests;

pub use identity::Pull;
pub use port::Port;
use refused::no_image;

/// The flags that `husk run` and `husk create` have in common.
#[derive(Clone, Debug, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    pub identity: identity::Identity,
    #[command(flatten)]
    process: process::Process,
    #[command(flatten)]
    network: network::Network,
    #[command(flatten)]
    storage: storage::Storage,
    #[command(flatten)]
    limits: limits::Limits,
    #[command(flatten)]
    security: security::Security,
}

/// The words behind the flags of `husk run` and `husk create`.
#[derive(Clone, Debug, clap::Args)]
pub struct Program {
    /// The image, and the program with its arguments in place of the image's.
    #[arg(
        value_name = "IMAGE [COMMAND]",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    words: Vec<String>,
}

impl Program {
    /// The image, and the command; none for the image's own.
    ///
    /// # Errors
    /// The words begin with a flag, which is told with the reason.
    pub fn image(&self) -> anyhow::Result<(&String, &[String])> {
        if let Some(refused) = no_image(&self.words) {
            anyhow::bail!(refused);
        }
        self.words.split_first().context("name an image")
    }
}

/// A container that is asked for, with the pod that it gets unless it joins one.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The container's name.
    pub name: String,
    /// The pod.
    pub pod: cri::PodSandboxConfig,
    /// The container.
    pub container: cri::ContainerConfig,
    /// The pod's resources and security, which become `pod.linux`.
    pod_linux: cri::LinuxPodSandboxConfig,
    /// The pod's security context.
    pod_security: cri::LinuxSandboxSecurityContext,
    /// The container's resources.
    resources: cri::LinuxContainerResources,
    /// The container's security context.
    container_security: cri::LinuxContainerSecurityContext,
    /// Lines of `/etc/hosts` that are added for the container.
    pub hosts: Vec<String>,
    /// Directories of the host that are made if they are missing.
    pub directories: Vec<PathBuf>,
    /// Images that are mounted.
    pub images: Vec<String>,
    /// Whether every port that the image exposes gets a port of the host.
    pub publish_all: bool,
}

impl Flags {
    /// The requests for a container of `image` that runs `command`.
    ///
    /// # Errors
    /// A flag whose value makes no sense, or that cannot be had.
    pub fn plan(&self, image: &str, command: &[String]) -> anyhow::Result<Plan> {
        let mut plan = Plan::default();
        plan.container.image = Some(cri::ImageSpec {
            image: image.to_owned(),
            user_specified_image: image.to_owned(),
            ..Default::default()
        });
        self.identity.apply(&mut plan)?;
        self.process.apply(command, &mut plan)?;
        self.network.apply(&mut plan)?;
        self.storage.apply(&mut plan)?;
        self.limits.apply(&mut plan)?;
        self.security.apply(&mut plan)?;
        if self.identity.pod.is_some()
            && let Some(flag) = self.flag_of_pod()
        {
            anyhow::bail!(
                "{flag} is the pod's, and --pod names one that exists: give it to `husk pod create`"
            );
        }
        Ok(plan.finish())
    }

    /// The first flag that was given and says something of the pod.
    fn flag_of_pod(&self) -> Option<&'static str> {
        let handler = self.identity.handler.is_some().then_some("--handler");
        self.network.flag_of_pod().or_else(|| self.security.flag_of_pod()).or(handler)
    }

    /// Seconds that the container has to end when it is asked to.
    pub fn stop_seconds(&self) -> Option<i64> {
        self.process.stop_timeout.map(i64::from)
    }

    /// Whether a terminal is asked for, and whether the input is.
    pub const fn streams(&self) -> (bool, bool) {
        (self.process.tty, self.process.interactive)
    }
}

impl Plan {
    /// Puts the parts that several groups write into their places.
    fn finish(mut self) -> Self {
        let mut pod = std::mem::take(&mut self.pod_linux);
        pod.security_context = Some(std::mem::take(&mut self.pod_security));
        self.pod.linux = Some(pod);
        self.container.linux = Some(cri::LinuxContainerConfig {
            resources: Some(std::mem::take(&mut self.resources)),
            security_context: Some(std::mem::take(&mut self.container_security)),
        });
        self
    }
}

/// `KEY=VALUE` pairs of a flag; a key alone has an empty value.
fn pairs(given: &[String]) -> impl Iterator<Item = (String, String)> {
    given.iter().map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key.to_owned(), value.to_owned())
    })
}
