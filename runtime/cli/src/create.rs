//! `husk create`: a container that is started later.

use anyhow::bail;
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
    /// The image, and the program with its arguments in place of the image's.
    #[arg(
        value_name = "IMAGE [COMMAND]",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    words: Vec<String>,
}

/// Makes the container and its pod.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    if let Some(refused) = spec::no_image(&arguments.words) {
        bail!(refused);
    }
    let mut made = Made::default();
    let mut interrupts = Interrupts::new()?;
    if let Err(error) = made.container(config, &arguments.flags, &arguments.words, &mut interrupts).await {
        if let Err(remains) = made.remove(config).await {
            eprintln!("husk: failed to remove what was made: {remains:#}");
        }
        return Err(error);
    }
    output::print(&format!("{}\n", made.container))
}
