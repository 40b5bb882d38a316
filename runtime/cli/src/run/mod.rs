//! `husk run`: a container from an image, with a pod of its own, in one line.

use std::process::ExitCode;

use anyhow::bail;
use husk_config::Config;
use husk_proto::cri;

use crate::client::{self, Client, said};
use crate::interrupts::Interrupts;
use crate::progress::stage;
use crate::spec::{self, Flags};
use crate::stream::{self, End, Stream};
use crate::{exit, output, stop};

pub mod make;

use make::Made;

/// The exit code of a failure of husk's own, of a program that cannot be run, and of one that is
/// not there, as docker has them.
const OWN_FAILURE: u8 = 125;
const NOT_RUNNABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// How often a stream that broke is opened again, each half a second after the other.
const AGAIN: u32 = 120;

/// Runs a program in a new container.
///
/// The container has a pod of its own, and so a virtual machine, unless --pod names one that there
/// is. husk ends with the program's exit code; 125 is a failure of husk's own, 126 a program that
/// cannot be run, and 127 one that the image does not have.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "husk run [OPTIONS] IMAGE [COMMAND]...",
    after_help = "Examples:\n  husk run -it --rm debian\n  husk run -d --name web -p 8080:80 nginx\n  husk run --rm --handler runc busybox uname -a"
)]
pub struct Arguments {
    /// Go on without the container, and print its id.
    #[arg(short, long)]
    detach: bool,
    /// Remove the container and its pod when the program has ended.
    #[arg(long)]
    rm: bool,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    program: spec::Program,
}

/// Runs the container to its end, or leaves it.
pub async fn run(arguments: &Arguments, config: &Config) -> ExitCode {
    match attempt(arguments, config).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("husk: {error:#}");
            ExitCode::from(code_of(&format!("{error:#}")))
        }
    }
}

/// The exit code for a failure, by the words with which runc tells that a program cannot be run.
fn code_of(error: &str) -> u8 {
    let of_program = error.contains("exec") && error.contains("start container");
    if of_program
        && (error.contains("executable file not found") || error.contains("no such file or directory"))
    {
        NOT_FOUND
    } else if of_program && (error.contains("permission denied") || error.contains("is a directory")) {
        NOT_RUNNABLE
    } else {
        OWN_FAILURE
    }
}

async fn attempt(arguments: &Arguments, config: &Config) -> anyhow::Result<u8> {
    arguments.program.image()?;
    if arguments.detach && arguments.rm {
        bail!("--rm with -d is not possible: huskd does not remove containers by itself yet; use husk rm -f");
    }
    let mut interrupts = Interrupts::new()?;
    let made = Made::new(config, &arguments.flags, &arguments.program, &mut interrupts).await?;
    match follow(arguments, config, &made, &mut interrupts).await {
        // Nothing has run: there is nothing to look at.
        Err(Failure::Start(error)) => {
            made.remove(config).await;
            Err(error)
        }
        Ok(Ended::Left) => Ok(0),
        Ok(Ended::Exited(code)) => {
            finish(arguments, config, &made).await;
            Ok(code)
        }
        Err(Failure::Later(error)) => {
            finish(arguments, config, &made).await;
            Err(error)
        }
    }
}

/// The end of a container that nobody looks after any more: removed with `--rm`, or else its VM
/// ends with it.
async fn finish(arguments: &Arguments, config: &Config, made: &Made) {
    if arguments.rm {
        return made.remove(config).await;
    }
    let stop = async {
        let mut client = client::connect_for_work(&config.socket).await?;
        made.stop_pod(&mut client).await
    };
    if let Err(error) = stage("stopping the pod", stop).await {
        eprintln!("husk: failed to stop the container's pod: {error:#}");
    }
}

/// How a container was left.
enum Ended {
    /// The container goes on.
    Left,
    Exited(u8),
}

enum Failure {
    /// The container did not start.
    Start(anyhow::Error),
    Later(anyhow::Error),
}

async fn follow(
    arguments: &Arguments,
    config: &Config,
    made: &Made,
    interrupts: &mut Interrupts,
) -> Result<Ended, Failure> {
    let (tty, stdin) = arguments.flags.streams();
    let mut client = client::connect_for_work(&config.socket).await.map_err(Failure::Start)?;
    if arguments.detach {
        start(&mut client, &made.container).await.map_err(Failure::Start)?;
        output::print(&format!("{}\n", made.container)).map_err(Failure::Later)?;
        return Ok(Ended::Left);
    }
    // Before the start, so that nothing of the output is missed.
    let stream = attach(&mut client, &made.container, tty, stdin).await.map_err(Failure::Start)?;
    start(&mut client, &made.container).await.map_err(Failure::Start)?;
    let wait = arguments.flags.stop_seconds().unwrap_or(stop::GRACE);
    watch(&mut client, &made.container, (tty, stdin), stream, wait, interrupts).await.map_err(Failure::Later)
}

/// Shows the output until the container has ended, or the user detaches. An interrupt asks the
/// container to end; a second one does not ask.
async fn watch(
    client: &mut Client,
    container: &str,
    (tty, stdin): (bool, bool),
    mut stream: Stream,
    mut wait: i64,
    interrupts: &mut Interrupts,
) -> anyhow::Result<Ended> {
    for _ in 0..AGAIN {
        let shown = stream.run();
        tokio::pin!(shown);
        let end = loop {
            tokio::select! {
                end = &mut shown => break end?,
                () = interrupts.next() => {
                    let request = cri::StopContainerRequest { container_id: container.to_owned(), timeout: wait };
                    wait = 0;
                    let mut client = client.clone();
                    tokio::spawn(async move { client.stop_container(request).await });
                }
            }
        };
        match end {
            End::Detached => return Ok(Ended::Left),
            End::Told(told) => {
                stream::code_of(&told)?;
                return Ok(Ended::Exited(exit::code(client, container).await?));
            }
            End::Lost => {}
        }
        // huskd was ended, and comes back; the container goes on.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        stream = match attach(client, container, tty, stdin).await {
            Ok(stream) => stream,
            Err(_) => return Ok(Ended::Exited(exit::code(client, container).await?)),
        };
    }
    bail!("huskd hangs up whenever container {container} is attached to: see its log")
}

/// Opens the streams of a container.
///
/// # Errors
/// huskd's.
pub async fn attach(client: &mut Client, container: &str, tty: bool, stdin: bool) -> anyhow::Result<Stream> {
    let request =
        cri::AttachRequest { container_id: container.to_owned(), stdin, tty, stdout: true, stderr: !tty };
    let url = client.attach(request).await.map_err(said)?.into_inner().url;
    Stream::open(&url, tty, stdin).await
}

/// Starts a container.
///
/// # Errors
/// huskd's.
pub async fn start(client: &mut Client, container: &str) -> anyhow::Result<()> {
    let request = cri::StartContainerRequest { container_id: container.to_owned() };
    stage("starting the container", client.start_container(request)).await.map_err(said)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_have_dockers_exit_codes() {
        let runc = |cause: &str| format!("huskd: start container: runc: exec: \"x\": {cause}");
        assert_eq!(code_of(&runc("executable file not found in $PATH")), 127);
        assert_eq!(code_of(&runc("stat /x: no such file or directory")), 127);
        assert_eq!(code_of(&runc("permission denied")), 126);
        assert_eq!(code_of("huskd: pull image: no such file or directory"), 125);
    }
}
