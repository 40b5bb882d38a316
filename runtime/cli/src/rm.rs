//! `husk rm`: containers, and the pods that were made for them alone.

use anyhow::bail;
use husk_config::Config;
use husk_proto::cri::{self, ContainerState};

use super::client::{self, Client};
use super::{find, labels, output};

/// Removes containers.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk rm -f $(husk ps -aq)")]
pub struct Arguments {
    /// The containers' ids, beginnings of ids, or names.
    #[arg(required = true)]
    containers: Vec<String>,
    /// Kill those that run.
    #[arg(short, long)]
    force: bool,
}

/// Removes one after the other, and prints what was removed.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect_for_work(&config.socket).await?;
    for wanted in &arguments.containers {
        let container = find::container(&mut client, wanted).await?;
        if container.state() == ContainerState::ContainerRunning && !arguments.force {
            bail!("container {wanted} runs: stop it first, or use --force");
        }
        remove(&mut client, &container).await?;
        labels::remove_files(config, container.annotations.get(labels::FILES));
        output::print(&format!("{wanted}\n"))?;
    }
    Ok(())
}

/// Removes a container, whatever it does, with the pod that was made for it alone.
pub async fn remove(client: &mut Client, container: &cri::Container) -> anyhow::Result<()> {
    if find::own_pod(client, container).await?.is_some() {
        return remove_pod(client, &container.pod_sandbox_id).await;
    }
    let request = cri::StopContainerRequest { container_id: container.id.clone(), timeout: 0 };
    client.stop_container(request).await.map_err(client::said)?;
    let request = cri::RemoveContainerRequest { container_id: container.id.clone() };
    client.remove_container(request).await.map_err(client::said)?;
    Ok(())
}

/// Removes a pod with its containers, which are killed.
pub async fn remove_pod(client: &mut Client, id: &str) -> anyhow::Result<()> {
    client::stop_pod(client, id).await?;
    let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
    client.remove_pod_sandbox(request).await.map_err(client::said)?;
    Ok(())
}
