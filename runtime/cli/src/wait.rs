//! `husk wait`: the end of containers.

use husk_config::Config;

use super::{client, exit, find, output};

/// Waits until containers have ended, and prints their exit codes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk wait job")]
pub struct Arguments {
    /// The containers' ids, beginnings of ids, or names.
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Prints an exit code for each container, in the order in which they were named.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect(&config.socket).await?;
    for wanted in &arguments.containers {
        let container = find::container(&mut client, wanted).await?;
        let status = exit::wait(&mut client, &container.id).await?;
        output::print(&format!("{}\n", status.exit_code))?;
    }
    Ok(())
}
