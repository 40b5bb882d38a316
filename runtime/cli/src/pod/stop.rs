//! `husk pod stop`: the end of pods' containers and VMs.

use husk_config::Config;

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
        client::stop_pod(&mut client, &client::find(&all, wanted)?.id).await?;
        output::print(&format!("{wanted}\n"))?;
    }
    Ok(())
}
