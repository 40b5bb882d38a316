//! `husk inspect`: the state of a VM, for a guest that hangs.

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

/// Prints the state.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let (id, control) = client::vm(config, &arguments.pod).await?;
    match control.inspect().await {
        Ok(inspection) => println!("{}", serde_json::to_string_pretty(&inspection)?),
        Err(error) => bail!("the VM of pod {id} does not run: {error}"),
    }
    Ok(())
}
