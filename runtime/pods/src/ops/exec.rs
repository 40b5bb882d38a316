//! A command in a container, with its streams at the client.

use std::convert::Infallible;
use std::sync::Arc;

use futures::FutureExt;
use husk_agent_client::Agent;
use husk_proto::agent::stream::{Kind, StreamHeader};
use husk_proto::agent::{ExecProcessRequest, ResizeTerminalRequest};
use husk_streaming::{Client, ExitStatus, Session, Sizes, StreamOptions, pump};
use tokio::net::UnixStream;
use tracing::Instrument;

use super::command::{Command, process_id};
use super::ready::pod_of_running;
use crate::{Error, Node};

/// Answers with the URL at which the client finds the command.
///
/// # Errors
/// A container that does not run, or streams that cannot be had together.
pub fn exec(
    node: &Arc<Node>,
    container_id: &str,
    args: Vec<String>,
    wanted: StreamOptions,
) -> Result<String, Error> {
    let (sandbox, container) = node.registry.container(container_id)?;
    if args.is_empty() {
        return Err(Error::Invalid("exec: no command".into()));
    }
    check("exec", wanted)?;
    let running = pod_of_running("exec", &sandbox, &container)?;
    let start = ExecProcessRequest {
        container_id: container.id.to_string(),
        process_id: process_id(),
        args,
        terminal: wanted.terminal,
        stdin: wanted.stdin,
    };
    let span = container.span();
    let run = |client| {
        let work = async move { run(&running.agent, start, client).await.unwrap_or_else(ExitStatus::Failed) };
        work.instrument(span).boxed()
    };
    Ok(node.streaming.offer(Session::Exec(wanted, Box::new(run)))?)
}

/// Streams that can be had together.
pub(crate) fn check(rpc: &str, wanted: StreamOptions) -> Result<(), Error> {
    if wanted.terminal && wanted.stderr {
        return Err(Error::Invalid(format!(
            "{rpc}: with a terminal, stderr is part of stdout: ask for one of `tty` and `stderr`"
        )));
    }
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return Err(Error::Invalid(format!("{rpc}: none of stdin, stdout and stderr is asked for")));
    }
    Ok(())
}

/// The client has come. When it goes before the command has ended, the
/// command's streams are closed: it reads the end of its input, fails to write
/// more output, and is hung up on if it has a terminal. One that has no streams
/// yet, or cannot have them, is killed.
async fn run(agent: &Agent, start: ExecProcessRequest, client: Client) -> Result<ExitStatus, String> {
    let Client { stdin, sizes, stdout, stderr, gone } = client;
    let (container_id, process_id) = (start.container_id.clone(), start.process_id.clone());
    let terminal = start.terminal;
    let command = Command::start(agent, start);
    command.runs().await.map_err(|error| error.to_string())?;

    let open = async |kind| -> Result<UnixStream, String> {
        let header =
            StreamHeader { kind, container_id: container_id.clone(), process_id: process_id.clone() };
        agent.open_stream(&header).await.map_err(|error| error.to_string())
    };
    // Output first: a command that ends at once must find a reader.
    let output = open(Kind::Stdout).await?;
    let errors = if terminal { None } else { Some(open(Kind::Stderr).await?) };
    command.leave();
    let typed = async {
        if let Some(stdin) = stdin
            && let Ok(input) = open(Kind::Stdin).await
        {
            pump::input(stdin, input).await;
        }
        std::future::pending::<Infallible>().await
    };
    let ended = async {
        let errors = async {
            match errors {
                Some(errors) => pump::output(errors, stderr).await,
                None => Ok(()),
            }
        };
        let (stdout, stderr, end) = tokio::join!(pump::output(output, stdout), errors, async {
            agent.wait_process(&container_id, &process_id).await
        });
        let end = end.map_err(|error| error.to_string())?;
        stdout.and(stderr).map_err(|error| format!("read output of the command: {error}"))?;
        Ok(match end.exit_code {
            0 => ExitStatus::Success,
            code => ExitStatus::Exit(code),
        })
    };
    tokio::select! {
        ended = ended => ended,
        never = typed => match never {},
        never = resize(agent, &container_id, &process_id, sizes) => match never {},
        () = gone.cancelled() => Err("the client has gone".into()),
    }
}

/// Gives the terminal the sizes that the client's has; for ever.
pub(crate) async fn resize(
    agent: &Agent,
    container_id: &str,
    process_id: &str,
    sizes: Option<Sizes>,
) -> Infallible {
    if let Some(mut sizes) = sizes {
        while let Some(size) = sizes.next().await {
            let request = ResizeTerminalRequest {
                container_id: container_id.to_owned(),
                process_id: process_id.to_owned(),
                rows: size.rows.into(),
                columns: size.columns.into(),
            };
            let resized = agent.call("resize", async |mut agent| agent.resize_terminal(request).await);
            if let Err(error) = resized.await {
                tracing::debug!(%error, "failed to resize a terminal");
            }
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use husk_agent_client::fake::Fake;
    use tokio_util::sync::CancellationToken;

    use super::*;

    const TEST_LIMIT: Duration = Duration::from_secs(20);

    /// A command whose output nobody wants: how it goes, and what it is sent.
    async fn exec(fake: Fake, limit: Duration) -> (String, Vec<(String, u32)>) {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(fake);
        let agent = fake.serve(folder.path(), limit).await;
        let start =
            ExecProcessRequest { container_id: "c".into(), process_id: "e".into(), ..Default::default() };
        let gone = CancellationToken::new();
        let client = Client { stdin: None, sizes: None, stdout: None, stderr: None, gone };
        let error = run(&agent, start, client).await.unwrap_err();
        (error, tokio::time::timeout(TEST_LIMIT, fake.signals(1)).await.unwrap())
    }

    #[tokio::test]
    async fn a_command_without_streams_is_killed() {
        let fake = Fake { without_streams: true, endless: true, ..Fake::default() };
        let (error, signals) = exec(fake, TEST_LIMIT).await;
        assert!(error.contains("out of streams"), "{error}");
        assert_eq!(signals, [("e".to_owned(), 9)]);
    }

    #[tokio::test]
    async fn a_command_that_has_started_too_late_is_killed() {
        let fake = Fake { start_takes: Duration::from_secs(1), endless: true, ..Fake::default() };
        let (_, signals) = exec(fake, Duration::from_millis(300)).await;
        assert_eq!(signals, [("e".to_owned(), 9)]);
    }
}
