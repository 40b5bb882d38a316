//! Follows a container from its creation to its end: its output into its log,
//! its end into its record.

use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::stream::{Greeting, Kind};
use husk_proto::agent::{SignalProcessRequest, WaitProcessRequest};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Container, Exit, log};
use crate::agent;
use crate::id::ContainerId;
use crate::sandbox::Sandbox;
use crate::vm::Machine;

/// Most time between the agent's word that a container has ended and the last
/// byte of its output.
const LAST_BYTES: Duration = Duration::from_secs(10);

/// Starts to follow a container that the agent has made. Its output streams
/// are open when this returns.
///
/// # Errors
/// A stream that cannot be opened.
pub async fn follow(
    sandbox: &Arc<Sandbox>,
    machine: &Arc<Machine>,
    container: &Arc<Container>,
) -> std::io::Result<()> {
    let mut output = Copies::default();
    open_output(machine, container, &mut output).await?;
    tokio::spawn(await_end(sandbox.clone(), machine.clone(), container.clone(), output));
    Ok(())
}

/// As [`follow`], for a container that an earlier huskd followed: output that
/// cannot be had is lost, and its end is awaited all the same.
pub async fn resume(sandbox: &Arc<Sandbox>, machine: &Arc<Machine>, container: &Arc<Container>) {
    let mut output = Copies::default();
    if let Err(error) = open_output(machine, container, &mut output).await {
        tracing::warn!(container = %container.id, %error, "output of a container is lost from here on");
    }
    tokio::spawn(await_end(sandbox.clone(), machine.clone(), container.clone(), output));
}

/// What copies the output.
#[derive(Default)]
struct Copies {
    tasks: JoinSet<std::io::Result<()>>,
    /// No more is waited for.
    enough: CancellationToken,
}

impl Copies {
    /// Returns once all that was said is in the log, and all that comes within
    /// [`LAST_BYTES`] if there is no end of it; false then.
    async fn finish(mut self) -> bool {
        let drained = async |tasks: &mut JoinSet<_>| while tasks.join_next().await.is_some() {};
        let whole = tokio::time::timeout(LAST_BYTES, drained(&mut self.tasks)).await.is_ok();
        // What waits then waits for the stream alone.
        self.enough.cancel();
        drained(&mut self.tasks).await;
        whole
    }
}

/// Tells whoever is attached that the output has ended, whyever it is not
/// followed any more.
struct End(Arc<Container>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.output.end();
    }
}

/// Opens the output streams, and copies what comes into the log and to whoever
/// is attached.
async fn open_output(
    machine: &Machine,
    container: &Arc<Container>,
    output: &mut Copies,
) -> std::io::Result<()> {
    let terminal = container.record().config.tty;
    for (kind, name) in [(Kind::Stdout, "stdout"), (Kind::Stderr, "stderr")] {
        if terminal && kind == Kind::Stderr {
            container.output.stderr.end();
            continue;
        }
        let greeting = Greeting { kind, container_id: container.id.to_string(), process_id: String::new() };
        let stream = machine.agent.open_stream(&greeting).await?;
        let log = container.log();
        let container = container.clone();
        let enough = output.enough.clone();
        output.tasks.spawn(async move {
            let attached = match kind {
                Kind::Stderr => &container.output.stderr,
                _ => &container.output.stdout,
            };
            let copied = log::copy(stream, name, log.as_deref(), attached, &enough).await;
            attached.end();
            copied
        });
    }
    Ok(())
}

/// A machine that ends takes the connection with it; whoever watches the
/// machine then records the end of its containers.
async fn await_end(sandbox: Arc<Sandbox>, machine: Arc<Machine>, container: Arc<Container>, output: Copies) {
    let _end = End(container.clone());
    let request = WaitProcessRequest { container_id: container.id.to_string(), process_id: String::new() };
    let ended = machine.agent.unlimited().wait_process(request).await;
    // Its log does not wait for who is attached any more.
    container.output.hurry();
    if !output.finish().await {
        tracing::warn!(container = %container.id, "output did not end with the container: the rest is lost");
    }
    match ended {
        Ok(end) => {
            let end = end.into_inner();
            let exit = Exit::reported(end.exit_code, end.oom_killed, end.finished_at_unix_nanos);
            sandbox.container_ended(&container, exit);
        }
        Err(status) if status.code() == tonic::Code::NotFound => {
            let exit = Exit::machine_gone("the agent does not know this container");
            sandbox.container_ended(&container, exit);
        }
        Err(status) => {
            tracing::debug!(container = %container.id, message = status.message(), "wait for container");
        }
    }
}

/// Sends a signal to a container's init, or to all its processes.
///
/// # Errors
/// The agent's.
pub async fn signal(machine: &Machine, id: &ContainerId, signal: i32, all: bool) -> Result<(), agent::Error> {
    let request = SignalProcessRequest {
        container_id: id.to_string(),
        process_id: String::new(),
        signal: signal.unsigned_abs(),
        all,
    };
    machine
        .agent
        .call("signal container", async |mut agent| agent.signal_process(request).await)
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::agent::fake::Fake;
    use crate::container::fanout::PATIENCE;
    use crate::container::log::LogFile;
    use crate::events::Events;
    use crate::sandbox::tests::{machine, running};

    /// Sooner than anybody is late.
    const SOON: Duration = PATIENCE.saturating_sub(Duration::from_secs(1));

    #[tokio::test]
    async fn the_end_of_the_log_does_not_wait_for_who_is_attached() {
        let folder = tempfile::tempdir().unwrap();
        let mut said = b"0123456789abcde\n".repeat(50_000);
        said.extend_from_slice(b"last");
        let fake = Arc::new(Fake { stdout: said.clone(), endless: true, ..Fake::default() });
        let machine = machine(fake.serve(folder.path(), Duration::from_secs(20)).await);
        let (sandbox, container) = running(folder.path(), "p", Events::default());
        let path = folder.path().join("0.log");
        container.set_log(Some(Arc::new(LogFile::open(&path).unwrap())));
        let mut attached = container.output.stdout.subscribe();
        follow(&sandbox, &machine, &container).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        fake.killed.send_replace(true);
        tokio::time::timeout(SOON, container.wait_exited()).await.unwrap();
        let logged = std::fs::read_to_string(&path).unwrap();
        assert_eq!(logged.lines().count(), 50_001);
        assert!(logged.ends_with("stdout P last\n"));
        let mut heard = Vec::new();
        while let Some(bytes) = tokio::time::timeout(SOON, attached.next()).await.unwrap() {
            heard.extend_from_slice(&bytes);
        }
        assert!(heard == said && !attached.was_dropped(), "{} bytes", heard.len());
    }

    #[tokio::test]
    async fn who_is_attached_to_output_that_is_lost_is_told_of_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake { without_streams: true, endless: true, ..Fake::default() });
        let machine = machine(fake.serve(folder.path(), Duration::from_secs(20)).await);
        let (sandbox, container) = running(folder.path(), "p", Events::default());
        resume(&sandbox, &machine, &container).await;
        let (mut stdout, mut stderr) =
            (container.output.stdout.subscribe(), container.output.stderr.subscribe());
        fake.killed.send_replace(true);
        for attached in [&mut stdout, &mut stderr] {
            assert_eq!(tokio::time::timeout(SOON, attached.next()).await.unwrap(), None);
        }
        assert!(matches!(container.state(), crate::container::State::Exited(_)));
    }
}
