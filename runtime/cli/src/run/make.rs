//! Makes the container of `husk run` and `husk create`, with a pod of its own unless it joins
//! one.

use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use anyhow::{Context, bail};
use husk_config::Config;
use husk_proto::cri;
use serde_json::Value;

use crate::client::{self, Client, Images, said};
use crate::interrupts::Interrupts;
use crate::progress::stage;
use crate::rm::remove_pod;
use crate::spec::{Flags, Plan, Port, Program, Pull};
use crate::{credentials, find, images, labels, output};

/// The name of the log in a container's directory.
const LOG: &str = "output.log";

/// Things that were made so far.
#[derive(Debug, Default)]
pub struct Made {
    /// The container, once there is one.
    pub container: String,
    /// The pod, once it is known.
    pub pod: String,
    /// Whether the pod was made for this container.
    pub own_pod: bool,
    /// The directory of logs and other files.
    files: Option<PathBuf>,
}

impl Made {
    /// Makes the container.
    ///
    /// # Errors
    /// The step that failed, or an interrupt. Nothing is left then.
    pub async fn new(
        config: &Config,
        flags: &Flags,
        program: &Program,
        interrupts: &mut Interrupts,
    ) -> anyhow::Result<Self> {
        let mut made = Self::default();
        match made.make(config, flags, program, interrupts).await {
            Ok(()) => Ok(made),
            Err(error) => {
                made.remove(config).await;
                Err(error)
            }
        }
    }

    /// Makes one thing after the other, and notes each as soon as there is one.
    async fn make(
        &mut self,
        config: &Config,
        flags: &Flags,
        program: &Program,
        interrupts: &mut Interrupts,
    ) -> anyhow::Result<()> {
        let (image, command) = program.image()?;
        let mut plan = flags.plan(image, command)?;
        plan.container.stdin_once = flags.streams().1;
        let mut client = client::connect_for_work(&config.socket).await?;
        let mut store = images::pull::connect(config).await?;
        refuse_taken(&mut client, &plan.name).await?;

        let known = fetch(&mut store, image, flags.identity.pull, interrupts).await?;
        if plan.publish_all {
            plan.pod.port_mappings.extend(Port::exposed_by(&known)?);
        }
        for image in std::mem::take(&mut plan.images) {
            fetch(&mut store, &image, flags.identity.pull, interrupts).await?;
        }
        self.make_files(config, &mut plan)?;
        interrupts.check()?;
        self.find_or_make_pod(&mut client, flags, &mut plan).await?;
        interrupts.check()?;
        self.make_container(&mut client, plan).await?;
        if let Some(file) = &flags.identity.cidfile {
            std::fs::write(file, &self.container)
                .with_context(|| format!("--cidfile: write {}", file.display()))?;
        }
        interrupts.check()
    }

    /// Makes the directory for the log, and what is mounted from the host.
    fn make_files(&mut self, config: &Config, plan: &mut Plan) -> anyhow::Result<()> {
        for directory in &plan.directories {
            if !directory.exists() {
                std::fs::create_dir_all(directory)
                    .with_context(|| format!("-v: make {}", directory.display()))?;
            }
        }
        let files = labels::new_files(config)?;
        let name = files.display().to_string();
        let make = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&files);
        make.with_context(|| format!("make the directory for logs, {name}: run husk as root"))?;
        if !plan.hosts.is_empty() {
            let hosts = files.join("hosts");
            let own = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
            std::fs::write(&hosts, format!("{own}{}\n", plan.hosts.join("\n")))
                .with_context(|| format!("--add-host: write {}", hosts.display()))?;
            plan.container.mounts.push(cri::Mount {
                host_path: hosts.display().to_string(),
                container_path: "/etc/hosts".into(),
                ..Default::default()
            });
        }
        plan.container.annotations.insert(labels::FILES.to_owned(), name.clone());
        plan.container.log_path = LOG.to_owned();
        plan.pod.annotations.insert(labels::FILES.to_owned(), name.clone());
        plan.pod.log_directory = name;
        self.files = Some(files);
        Ok(())
    }

    async fn find_or_make_pod(
        &mut self,
        client: &mut Client,
        flags: &Flags,
        plan: &mut Plan,
    ) -> anyhow::Result<()> {
        if let Some(wanted) = &flags.identity.pod {
            let pods = client::pods(client).await?;
            self.pod = client::find(&pods, wanted)?.id.clone();
            plan.pod = client::pod_config(&client::status(client, &self.pod).await?);
            // The log is below the pod's directory of logs: both are named by the container.
            if let (Some(files), false) = (&self.files, plan.pod.log_directory.is_empty()) {
                let name = files.file_name().unwrap_or_default().to_string_lossy();
                plan.container.log_path = format!("{name}/{LOG}");
            }
            return Ok(());
        }
        let request = cri::RunPodSandboxRequest {
            config: Some(plan.pod.clone()),
            runtime_handler: flags.identity.handler.clone().unwrap_or_default(),
        };
        let made = stage("starting the pod", client.run_pod_sandbox(request)).await.map_err(said)?;
        self.pod = made.into_inner().pod_sandbox_id;
        self.own_pod = true;
        Ok(())
    }

    async fn make_container(&mut self, client: &mut Client, plan: Plan) -> anyhow::Result<()> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: self.pod.clone(),
            config: Some(plan.container),
            sandbox_config: Some(plan.pod),
        };
        let made = stage("creating the container", client.create_container(request)).await.map_err(said)?;
        self.container = made.into_inner().container_id;
        Ok(())
    }

    /// Removes all that was made; a failure to is told, and is not what matters most.
    pub async fn remove(&self, config: &Config) {
        if let Err(error) = stage("removing the container", self.try_remove(config)).await {
            eprintln!("husk: failed to remove what was made: {error:#}");
        }
    }

    async fn try_remove(&self, config: &Config) -> anyhow::Result<()> {
        let mut client = client::connect_for_work(&config.socket).await?;
        if self.own_pod {
            remove_pod(&mut client, &self.pod).await?;
        } else if !self.container.is_empty() {
            let request = cri::RemoveContainerRequest { container_id: self.container.clone() };
            client.remove_container(request).await.map_err(said)?;
        }
        let files = self.files.as_ref().map(|files| files.display().to_string());
        labels::remove_files(config, files.as_ref());
        Ok(())
    }

    /// Stops the pod that was made for the container, whose VM would go on for nothing.
    ///
    /// # Errors
    /// huskd's.
    pub async fn stop_pod(&self, client: &mut Client) -> anyhow::Result<()> {
        if self.own_pod {
            client::stop_pod(client, &self.pod).await?;
        }
        Ok(())
    }
}

async fn refuse_taken(client: &mut Client, name: &str) -> anyhow::Result<()> {
    let containers = find::containers(client).await?;
    match containers.iter().find(|container| find::own_name(container) == Some(name)) {
        Some(other) => {
            let id = output::short(&other.id);
            bail!("the name {name} is container {id}'s: remove it (husk rm {name}), or choose another name")
        }
        None => Ok(()),
    }
}

/// The verbose part of an image, which is pulled if the policy says so. A pull ends at an interrupt.
async fn fetch(
    store: &mut Images,
    name: &str,
    policy: Pull,
    interrupts: &mut Interrupts,
) -> anyhow::Result<Value> {
    let known = images::status(store, name).await?;
    match (known, policy) {
        (Some((_, info)), Pull::Missing | Pull::Never) => return Ok(info),
        (None, Pull::Never) => bail!("the node does not have image {name}, and --pull never was given"),
        (_, Pull::Missing | Pull::Always) => {}
    }
    if !std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        eprintln!("husk: pulling {name}");
    }
    let auth = credentials::of_image(name).await?;
    let text = format!("pulling {name}");
    tokio::select! {
        pulled = stage(&text, images::pull::pull(store, name, auth)) => pulled.map(drop)?,
        () = interrupts.next() => bail!("interrupted while pulling {name}"),
    }
    match images::status(store, name).await? {
        Some((_, info)) => Ok(info),
        None => bail!("image {name} was removed while it was needed: try again"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        flags: Flags,
    }

    #[test]
    fn logs_and_hosts_are_in_a_directory_of_the_containers_own() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { state_dir: folder.path().to_owned(), ..Config::default() };
        let volume = folder.path().join("made/by/husk");
        let line = format!("run --add-host db:10.0.0.9 -v {}:/data", volume.display());
        let flags = Line::parse_from(line.split(' ')).flags;
        let mut plan = flags.plan("busybox", &[]).unwrap();
        let mut made = Made::default();
        made.make_files(&config, &mut plan).unwrap();
        assert!(volume.is_dir());
        let files = PathBuf::from(&plan.pod.log_directory);
        assert!(files.starts_with(labels::all_files(&config)));
        assert_eq!(plan.container.annotations[labels::FILES], plan.pod.log_directory);
        let hosts = std::fs::read_to_string(files.join("hosts")).unwrap();
        assert!(hosts.contains("localhost") && hosts.ends_with("10.0.0.9\tdb\n"), "{hosts}");
        assert!(plan.container.mounts.iter().any(|mount| mount.container_path == "/etc/hosts"));
    }
}
