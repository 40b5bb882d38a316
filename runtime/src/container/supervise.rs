//! Follows a container from its creation to its end: its output into its log,
//! its end into its record.

use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::stream::{Greeting, Kind};
use husk_proto::agent::{SignalProcessRequest, WaitProcessRequest};
use tokio::task::JoinSet;

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
    let mut output = JoinSet::new();
    open_output(machine, container, &mut output).await?;
    tokio::spawn(await_end(sandbox.clone(), machine.clone(), container.clone(), output));
    Ok(())
}

/// As [`follow`], for a container that an earlier huskd followed: output that
/// cannot be had is lost, and its end is awaited all the same.
pub async fn resume(sandbox: &Arc<Sandbox>, machine: &Arc<Machine>, container: &Arc<Container>) {
    let mut output = JoinSet::new();
    if let Err(error) = open_output(machine, container, &mut output).await {
        tracing::warn!(container = %container.id, %error, "output of a container is lost from here on");
    }
    tokio::spawn(await_end(sandbox.clone(), machine.clone(), container.clone(), output));
}

/// Opens the output streams, and copies what comes into the log and to whoever
/// is attached.
async fn open_output(
    machine: &Machine,
    container: &Arc<Container>,
    output: &mut JoinSet<std::io::Result<()>>,
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
        output.spawn(async move {
            let attached = match kind {
                Kind::Stderr => &container.output.stderr,
                _ => &container.output.stdout,
            };
            let copied = log::copy(stream, name, log.as_deref(), attached).await;
            attached.end();
            copied
        });
    }
    Ok(())
}

/// A machine that ends takes the connection with it; whoever watches the
/// machine then records the end of its containers.
async fn await_end(
    sandbox: Arc<Sandbox>,
    machine: Arc<Machine>,
    container: Arc<Container>,
    mut output: JoinSet<std::io::Result<()>>,
) {
    let request = WaitProcessRequest { container_id: container.id.to_string(), process_id: String::new() };
    match machine.agent.unlimited().wait_process(request).await {
        Ok(end) => {
            let end = end.into_inner();
            let drained = async { while output.join_next().await.is_some() {} };
            if tokio::time::timeout(LAST_BYTES, drained).await.is_err() {
                tracing::warn!(container = %container.id, "output did not end with the container: the rest is lost");
            }
            let exit = Exit::reported(end.exit_code, end.oom_killed, end.finished_at_unix_nanos);
            sandbox.events.container_ended(&sandbox, &container, exit);
        }
        Err(status) if status.code() == tonic::Code::NotFound => {
            let exit = Exit::machine_gone("the agent does not know this container");
            sandbox.events.container_ended(&sandbox, &container, exit);
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
