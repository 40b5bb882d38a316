//! `husk exec` and `husk attach`: the streams of a container that runs.

use std::process::ExitCode;

use anyhow::bail;
use husk_config::Config;
use husk_proto::cri;

use super::client::{self, said};
use super::stream::{self, End, Stream};
use super::{exit, find};

/// Runs a program in a container, and ends with its exit code.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "husk exec [OPTIONS] CONTAINER COMMAND [ARGUMENT]...",
    after_help = "Examples:\n  husk exec -it web sh\n  husk exec web env A=1 printenv A"
)]
pub struct Arguments {
    /// Pass the standard input on.
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal.
    #[arg(short, long)]
    tty: bool,
    /// The container, and the program with its arguments.
    #[arg(
        value_name = "CONTAINER COMMAND",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    words: Vec<String>,
}

/// Joins a container's output and input.
///
/// Ctrl-P, Ctrl-Q leaves a container with a terminal to itself.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk attach shell")]
pub struct Attach {
    /// The container's id, the beginning of its id, or its name.
    container: String,
    /// Pass no input on.
    #[arg(long)]
    no_stdin: bool,
}

/// Runs the program.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<ExitCode> {
    let Some((wanted, command)) = arguments.words.split_first() else { bail!("name a container") };
    if wanted.starts_with('-') {
        bail!(
            "unknown flag {wanted}: CRI's exec takes -i and -t alone; for variables, run `env A=1 PROGRAM`"
        );
    }
    if command.is_empty() {
        bail!("name a program: husk exec {wanted} sh");
    }
    let mut client = client::connect(&config.socket).await?;
    let container = find::container(&mut client, wanted).await?;
    let request = cri::ExecRequest {
        container_id: container.id,
        cmd: command.to_vec(),
        tty: arguments.tty,
        stdin: arguments.interactive,
        stdout: true,
        stderr: !arguments.tty,
    };
    let url = client.exec(request).await.map_err(said)?.into_inner().url;
    match Stream::open(&url, arguments.tty, arguments.interactive).await?.run().await? {
        End::Told(told) => Ok(ExitCode::from(stream::code_of(&told)?)),
        End::Detached => Ok(ExitCode::SUCCESS),
        End::Lost => bail!("huskd hung up; the program was ended with the connection"),
    }
}

/// Joins the container until it ends, or the user detaches.
pub async fn attach(arguments: &Attach, config: &Config) -> anyhow::Result<ExitCode> {
    let mut client = client::connect(&config.socket).await?;
    let container = find::container(&mut client, &arguments.container).await?;
    let (tty, stdin) = terminal_and_input(&mut client, &container.id).await?;
    let stream = super::run::attach(&mut client, &container.id, tty, stdin && !arguments.no_stdin).await?;
    match stream.run().await? {
        End::Detached => Ok(ExitCode::SUCCESS),
        End::Lost => bail!("huskd hung up; the container goes on: attach again, or see husk logs"),
        End::Told(told) => {
            stream::code_of(&told)?;
            Ok(ExitCode::from(exit::code(&mut client, &container.id).await?))
        }
    }
}

/// Whether a container has a terminal, and whether it takes input, as the verbose part of its status
/// has it.
async fn terminal_and_input(client: &mut client::Client, id: &str) -> anyhow::Result<(bool, bool)> {
    let status = find::status(client, id).await?;
    let info = client::info(&status.info);
    let is = |field: &str| info.pointer(field).and_then(serde_json::Value::as_bool).unwrap_or(false);
    Ok((is("/config/tty"), is("/config/stdin")))
}
