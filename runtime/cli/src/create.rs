//! `husk create`: a container that is started later.

use husk_config::Config;

use super::run::make::Made;
use super::{interrupts::Interrupts, output, spec};

/// Makes a container, and prints its id.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "husk create [OPTIONS] IMAGE [COMMAND]...",
    after_help = "Example:\n  husk create --name web -p 8080:80 nginx && husk start web"
)]
pub struct Arguments {
    #[command(flatten)]
    flags: spec::Flags,
    #[command(flatten)]
    program: spec::Program,
}

/// Makes the container and its pod.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::new()?;
    let made = Made::new(config, &arguments.flags, &arguments.program, &mut interrupts).await?;
    output::print(&format!("{}\n", made.container))
}
