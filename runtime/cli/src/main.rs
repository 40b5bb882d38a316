//! `husk`: the command line.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use husk_config::Config;

mod check;
mod client;
mod completion;
mod console;
mod create;
mod credentials;
mod events;
mod exec;
mod exit;
mod find;
mod images;
mod info;
mod inspect;
mod interrupts;
mod labels;
mod logs;
mod output;
mod pod;
mod pods;
mod port;
mod progress;
mod ps;
mod rm;
mod run;
mod signal;
mod spec;
mod start;
mod stats;
mod stop;
mod stream;
mod version;
mod wait;

/// Runs containers, each in a virtual machine of its own, and shows and ends what runs on this node.
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
    Run(Box<run::Arguments>),
    Create(Box<create::Arguments>),
    Start(start::Arguments),
    Exec(exec::Arguments),
    Attach(exec::Attach),
    Check(check::Arguments),
    Pods(pods::Arguments),
    Pod(pod::Arguments),
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
    Ps(ps::Arguments),
    Stop(stop::Arguments),
    Rm(rm::Arguments),
    Logs(logs::Arguments),
    Wait(wait::Arguments),
    Stats(stats::Arguments),
    Port(port::Arguments),
    Events(events::Arguments),
    /// Prints the versions of husk and of the huskd that runs.
    Version,
    Completion(completion::Arguments),
    #[command(hide = true)]
    Manual(completion::Manual),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        // The reader of a pipe has read as much as it wanted.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    kind == Some(std::io::ErrorKind::BrokenPipe)
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start")?;
    // `husk check` works without a usable configuration.
    let config = Config::load(&arguments.config);
    let done = runtime.block_on(async {
        match &arguments.command {
            Command::Run(run) => return Ok(run::run(run, &config?).await),
            Command::Create(create) => create::run(create, &config?).await?,
            Command::Start(start) => start::run(start, &config?).await?,
            Command::Exec(exec) => return exec::run(exec, &config?).await,
            Command::Attach(attach) => return exec::attach(attach, &config?).await,
            Command::Check(check) => return Ok(check::run(check, &arguments.config, config).await),
            Command::Pods(pods) => pods::run(pods, &config?).await?,
            Command::Pod(pod) => pod::run(pod, &config?).await?,
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
            Command::Ps(ps) => ps::run(ps, &config?).await?,
            Command::Stop(stop) => stop::run(stop, &config?).await?,
            Command::Rm(rm) => rm::run(rm, &config?).await?,
            Command::Logs(logs) => logs::run(logs, &config?).await?,
            Command::Wait(wait) => wait::run(wait, &config?).await?,
            Command::Stats(stats) => stats::run(stats, &config?).await?,
            Command::Port(port) => port::run(port, &config?).await?,
            Command::Events(events) => events::run(events, &config?).await?,
            Command::Version => version::run(&config?).await,
            Command::Completion(shell) => completion::run(shell, Arguments::command())?,
            Command::Manual(manual) => completion::manual(manual, Arguments::command())?,
        }
        Ok(ExitCode::SUCCESS)
    });
    // A read of the terminal may go on for ever, and nobody waits for it.
    runtime.shutdown_background();
    done
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Headings of `docs/cli.md`, each with the help text that belongs below it.
    fn help_texts() -> Vec<(String, String)> {
        let mut husk = Arguments::command().bin_name("husk");
        husk.build();
        let mut texts = Vec::new();
        add_help(&mut husk, "husk", &mut texts);
        texts
    }

    fn add_help(command: &mut clap::Command, name: &str, texts: &mut Vec<(String, String)>) {
        texts.push((format!("## `{name}`"), command.render_long_help().to_string()));
        for inner in
            command.get_subcommands_mut().filter(|inner| inner.get_name() != "help" && !inner.is_hide_set())
        {
            let name = format!("{name} {}", inner.get_name());
            add_help(inner, &name, texts);
        }
    }

    /// The page with `help` in the block below `heading`; a heading that is missing is added
    /// before huskd's.
    fn with_block(page: &str, heading: &str, help: &str) -> String {
        let Some(start) = page.find(&format!("{heading}\n")) else {
            let (before, after) = page.split_once("## `huskd`").unwrap();
            return format!("{before}{heading}\n\n```text\n{}\n```\n\n## `huskd`{after}", help.trim_end());
        };
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
        let headings = wanted.lines().filter(|line| line.starts_with("## `husk ")).count();
        assert_eq!(headings, texts.len() - 1, "docs/cli.md describes a command that does not exist");
    }
}
