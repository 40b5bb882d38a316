//! `husk start`: starts containers that were created.

use anyhow::bail;
use husk_config::Config;
use husk_proto::cri::ContainerState;

use super::{client, find, output};

/// Starts containers that `husk create` made.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk start web")]
pub struct Arguments {
    /// The containers' ids, beginnings of ids, or names.
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Starts one after the other, and prints their names.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect_for_work(&config.socket).await?;
    for wanted in &arguments.containers {
        let container = find::container(&mut client, wanted).await?;
        match container.state() {
            ContainerState::ContainerRunning => {}
            ContainerState::ContainerExited => bail!(
                "container {wanted} has ended, and CRI starts a container once: make a new one with husk run, and remove \
                 this one with husk rm {wanted}"
            ),
            _ => super::run::start(&mut client, &container.id).await?,
        }
        output::print(&format!("{wanted}\n"))?;
    }
    Ok(())
}
