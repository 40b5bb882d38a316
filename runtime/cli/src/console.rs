//! `husk console`: what the guest's kernel and agent last said.

use anyhow::bail;
use husk_config::Config;

use super::client;

/// Prints the last lines of the console of a pod's guest.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The pod's id, the beginning of its id, its name, or NAMESPACE/NAME. While
    /// huskd does not run, only the id works.
    pod: String,
}

/// Prints it as it is.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let id = client::find_id(config, &arguments.pod).await?;
    let Some(control) = client::control(config, &id) else {
        bail!("pod {id} has no console: its containers are the host's");
    };
    if let Err(error) = control.info().await {
        bail!("the machine of pod {id} does not run: {error}");
    }
    print!("{}", control.console().await);
    Ok(())
}
