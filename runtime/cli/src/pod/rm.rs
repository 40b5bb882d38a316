//! `husk pod rm`: pods, and their containers with them.

use anyhow::bail;
use husk_config::Config;
use husk_proto::cri::PodSandboxState;

use crate::{client, labels, output, rm};

/// Removes pods and their containers.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk pod rm -f web")]
pub struct Arguments {
    /// The pods' ids, beginnings of ids, names, or NAMESPACE/NAME.
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
    /// Stop those that are ready.
    #[arg(short, long)]
    force: bool,
}

/// Removes one after the other, and prints what was removed.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect_for_work(&config.socket).await?;
    for wanted in &arguments.pods {
        let all = client::pods(&mut client).await?;
        let pod = client::find(&all, wanted)?;
        if pod.state() == PodSandboxState::SandboxReady && !arguments.force {
            bail!("pod {wanted} is ready: stop it first, or use --force");
        }
        rm::remove_pod(&mut client, &pod.id).await?;
        labels::remove_files(config, pod.annotations.get(labels::FILES));
        output::print(&format!("{wanted}\n"))?;
    }
    Ok(())
}
