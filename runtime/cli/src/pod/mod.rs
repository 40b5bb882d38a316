//! `husk pod`: whole pods, with their containers.

use husk_config::Config;

mod inspect;
mod rm;
mod stats;
mod stop;

/// Lists, shows, stops and removes pods.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Lists the pods of this node, as `husk pods` does.
    Ls(super::pods::Arguments),
    Inspect(inspect::Arguments),
    Stats(stats::Arguments),
    Stop(stop::Arguments),
    Rm(rm::Arguments),
}

/// Runs the verb.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    match &arguments.command {
        Command::Ls(ls) => super::pods::run(ls, config).await,
        Command::Inspect(inspect) => inspect::run(inspect, config).await,
        Command::Stats(stats) => stats::run(stats, config).await,
        Command::Stop(stop) => stop::run(stop, config).await,
        Command::Rm(rm) => rm::run(rm, config).await,
    }
}
