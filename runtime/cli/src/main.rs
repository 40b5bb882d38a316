//! `husk`: the command line.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use husk_config::Config;

mod check;
mod client;
mod console;
mod info;
mod inspect;
mod pods;
mod version;

/// Looks after pods in virtual machines.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// huskd's configuration; without the file everything has its default.
    #[arg(long, global = true, default_value = "/etc/husk/config.toml", env = "HUSK_CONFIG")]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Check(check::Arguments),
    Pods(pods::Arguments),
    Info(info::Arguments),
    Console(console::Arguments),
    Inspect(inspect::Arguments),
    Version,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("husk: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start")?;
    // Without a usable configuration there is still much to check.
    let config = Config::load(&arguments.config);
    runtime.block_on(async {
        match &arguments.command {
            Command::Check(check) => return Ok(check::run(check, &arguments.config, config).await),
            Command::Pods(pods) => pods::run(pods, &config?).await?,
            Command::Info(info) => info::run(info, &config?).await?,
            Command::Console(console) => console::run(console, &config?).await?,
            Command::Inspect(inspect) => inspect::run(inspect, &config?).await?,
            Command::Version => version::run(&config?).await,
        }
        Ok(ExitCode::SUCCESS)
    })
}
