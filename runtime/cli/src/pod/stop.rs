//! `husk pod stop`: the end of pods' containers and VMs.

use husk_config::Config;
use husk_proto::cri;

use crate::{client, output};

/// Stops pods: kills their containers, ends their VMs and gives their addresses back. Their logs stay.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk pod stop web")]
pub struct Arguments {
    /// The pods' ids, beginnings of ids, names, or NAMESPACE/NAME.
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

/// Stops one after the other, and prints what was stopped.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect_for_work(&config.socket).await?;
    for wanted in &arguments.pods {
        let all = client::pods(&mut client).await?;
        let pod_sandbox_id = client::find(&all, wanted)?.id.clone();
        let request = cri::StopPodSandboxRequest { pod_sandbox_id };
        client.stop_pod_sandbox(request).await.map_err(client::said)?;
        output::print(&format!("{wanted}\n"))?;
    }
    Ok(())
}
