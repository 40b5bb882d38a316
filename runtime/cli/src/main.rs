//! `husk`: the command line.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use husk_config::Config;

mod check;
mod client;
mod console;
mod credentials;
mod images;
mod info;
mod inspect;
mod pods;
mod version;

/// Shows the pods of this node and their virtual machines, and manages images.
#[derive(Debug, Parser)]
#[command(name = "husk", version)]
struct Arguments {
    /// The configuration file of huskd. Without the file, every key has its default.
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
    Images(images::list::Arguments),
    Pull(images::pull::Arguments),
    Rmi(images::remove::Arguments),
    Image(images::Arguments),
    History(images::history::Arguments),
    Login(credentials::login::Arguments),
    Logout(credentials::login::Logout),
    System(images::df::Arguments),
    /// Prints the versions of husk and of the huskd that runs.
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
    // `husk check` works without a usable configuration.
    let config = Config::load(&arguments.config);
    runtime.block_on(async {
        match &arguments.command {
            Command::Check(check) => return Ok(check::run(check, &arguments.config, config).await),
            Command::Pods(pods) => pods::run(pods, &config?).await?,
            Command::Info(info) => info::run(info, &config?).await?,
            Command::Console(console) => console::run(console, &config?).await?,
            Command::Inspect(inspect) => inspect::run(inspect, &config?).await?,
            Command::Images(list) => images::list::run(list, &config?).await?,
            Command::Pull(pull) => images::pull::run(pull, &config?).await?,
            Command::Rmi(remove) => images::remove::run(remove, &config?).await?,
            Command::Image(image) => images::run(image, &config?).await?,
            Command::History(history) => images::history::run(history, &config?).await?,
            Command::Login(login) => credentials::login::run(login).await?,
            Command::Logout(logout) => credentials::login::logout(logout).await?,
            Command::System(system) => images::df::run(system, &config?).await?,
            Command::Version => version::run(&config?).await,
        }
        Ok(ExitCode::SUCCESS)
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;

    use super::*;

    /// Headings of `docs/cli.md`, each with the help text that belongs below it.
    fn help_texts() -> Vec<(String, String)> {
        let mut husk = Arguments::command().bin_name("husk");
        husk.build();
        let mut texts = vec![("## `husk`".to_owned(), husk.render_long_help().to_string())];
        for command in husk.get_subcommands_mut().filter(|command| command.get_name() != "help") {
            let heading = format!("## `husk {}`", command.get_name());
            texts.push((heading, command.render_long_help().to_string()));
        }
        texts
    }

    /// The page with `help` in the block below `heading`.
    fn with_block(page: &str, heading: &str, help: &str) -> String {
        let start =
            page.find(&format!("{heading}\n")).unwrap_or_else(|| panic!("docs/cli.md has no {heading}"));
        let begin = start + page[start..].find("```text\n").unwrap() + "```text\n".len();
        let end = begin + page[begin..].find("```").unwrap();
        format!("{}{}\n{}", &page[..begin], help.trim_end(), &page[end..])
    }

    #[test]
    fn the_manual_has_the_help_of_every_command() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path =
            here.ancestors().map(|folder| folder.join("docs/cli.md")).find(|path| path.is_file()).unwrap();
        let page = std::fs::read_to_string(&path).unwrap();
        let texts = help_texts();
        let wanted =
            texts.iter().fold(page.clone(), |page, (heading, help)| with_block(&page, heading, help));
        if std::env::var_os("HUSK_UPDATE_DOCS").is_some() {
            std::fs::write(&path, &wanted).unwrap();
        } else {
            assert_eq!(page, wanted, "run this test with HUSK_UPDATE_DOCS=1 to update docs/cli.md");
        }
        let headings = page.lines().filter(|line| line.starts_with("## `husk ")).count();
        assert_eq!(headings, texts.len() - 1, "docs/cli.md describes a command that does not exist");
    }
}
