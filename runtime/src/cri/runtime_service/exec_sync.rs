//! ExecSync: runs a command in a container and answers with what it said.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use husk_proto::agent::stream::{Greeting, Kind};
use husk_proto::agent::{ExecProcessRequest, SignalProcessRequest, WaitProcessRequest};
use husk_proto::cri::{ExecSyncRequest, ExecSyncResponse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::create_container::ready_machine;
use crate::container::{Container, State};
use crate::cri::error::Error;
use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::vm::Machine;

/// Most bytes of output that are kept, of stdout and of stderr; as CRI says.
/// The rest is read and dropped, so that the command does not stall.
const MAX_OUTPUT: u64 = 16 * 1024 * 1024;

/// A name for one more command: no other of this or an earlier huskd has it.
pub(super) fn process_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("exec-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The machine of a container that runs.
pub(super) fn running(verb: &str, sandbox: &Sandbox, container: &Container) -> Result<Arc<Machine>, Error> {
    let state = container.state();
    if state != State::Running {
        let (id, word) = (&container.id, state.word());
        return Err(Error::FailedPrecondition(format!("{verb}: container `{id}` is {word}")));
    }
    ready_machine(sandbox)
}

pub(super) async fn exec_sync(node: &Arc<Node>, request: ExecSyncRequest) -> Result<ExecSyncResponse, Error> {
    let (sandbox, container) = node.registry.container(&request.container_id)?;
    if request.cmd.is_empty() {
        return Err(Error::InvalidArgument("exec: no command".into()));
    }
    let machine = running("exec", &sandbox, &container)?;
    let process_id = process_id();
    let start = ExecProcessRequest {
        container_id: container.id.to_string(),
        process_id: process_id.clone(),
        args: request.cmd,
        terminal: false,
        stdin: false,
    };
    machine.agent.call("exec", async |mut agent| agent.exec_process(start).await).await?;
    let run = output(&machine, container.id.as_str(), &process_id);
    let limit = u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0);
    let Some(limit) = limit else { return run.await };
    match tokio::time::timeout(Duration::from_secs(limit), run).await {
        Ok(answer) => answer,
        Err(_) => {
            let kill = SignalProcessRequest {
                container_id: container.id.to_string(),
                process_id,
                signal: libc::SIGKILL.unsigned_abs(),
                all: false,
            };
            if let Err(error) =
                machine.agent.call("kill", async |mut agent| agent.signal_process(kill).await).await
            {
                tracing::warn!(container = %container.id, %error, "kill a command that took too long");
            }
            Err(Error::DeadlineExceeded(format!(
                "exec: the command did not end within {limit} s and was killed"
            )))
        }
    }
}

async fn output(machine: &Machine, container_id: &str, process_id: &str) -> Result<ExecSyncResponse, Error> {
    let read = async |kind| {
        let greeting =
            Greeting { kind, container_id: container_id.to_owned(), process_id: process_id.to_owned() };
        let mut stream = machine.agent.open_stream(&greeting).await?;
        let mut kept = Vec::new();
        (&mut stream).take(MAX_OUTPUT).read_to_end(&mut kept).await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
        let _ = stream.shutdown().await;
        Ok::<_, std::io::Error>(kept)
    };
    let wait = async {
        let request =
            WaitProcessRequest { container_id: container_id.to_owned(), process_id: process_id.to_owned() };
        machine.agent.unlimited().wait_process(request).await
    };
    let (stdout, stderr, end) = tokio::join!(read(Kind::Stdout), read(Kind::Stderr), wait);
    let failed = |what: &'static str| {
        move |error: std::io::Error| Error::Internal(format!("exec: read {what} of the command: {error}"))
    };
    let end = end.map_err(|status| crate::agent::Error { stage: "exec", status: Box::new(status) })?;
    Ok(ExecSyncResponse {
        stdout: stdout.map_err(failed("stdout"))?,
        stderr: stderr.map_err(failed("stderr"))?,
        exit_code: end.into_inner().exit_code,
    })
}
