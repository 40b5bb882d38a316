//! `husk inspect`: what a machine is at, for a guest that hangs.

use anyhow::bail;
use husk_config::Config;

use super::client;

/// Prints the state of the vCPUs and devices of a pod's machine, as JSON.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The pod's id, the beginning of its id, its name, or NAMESPACE/NAME. While
    /// huskd does not run, only the id works.
    pod: String,
}

/// Prints it.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let id = client::find_id(config, &arguments.pod).await?;
    let Some(control) = client::control(config, &id) else {
        bail!("pod {id} has no machine: its containers are the host's");
    };
    match control.inspect().await {
        Ok(inspection) => println!("{}", serde_json::to_string_pretty(&inspection)?),
        Err(error) => bail!("the machine of pod {id} does not run: {error}"),
    }
    Ok(())
}
