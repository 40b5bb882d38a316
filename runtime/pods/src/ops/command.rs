//! A command in a container, which does not outlive whoever wants it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use husk_agent_client::{self as agent, Agent};
use husk_proto::agent::{ExecProcessRequest, SignalProcessRequest};
use tonic::{Code, Response, Status};
use tracing::Instrument;

/// Most time until it is known whether a command was started, so that it can be
/// killed: longer than the agent waits for runc.
const LATE_START: Duration = Duration::from_secs(150);

/// A name for one more command: no other of this or an earlier huskd has it.
pub(crate) fn process_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("exec-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A command that is killed when nobody waits for it any more.
pub(crate) struct Command {
    pub(crate) agent: Agent,
    pub(crate) container_id: String,
    pub(crate) process_id: String,
    /// The agent's word that it runs, or does not.
    started: Shared<BoxFuture<'static, Result<(), Status>>>,
    pub(crate) ended: bool,
}

impl Command {
    /// The agent goes on with a start whoever waits for it. So does this: it
    /// must be known what there is to kill.
    pub(crate) fn start(agent: &Agent, request: ExecProcessRequest) -> Self {
        let (container_id, process_id) = (request.container_id.clone(), request.process_id.clone());
        let mut client = agent.unlimited();
        let start = async move {
            match tokio::time::timeout(LATE_START, client.exec_process(request)).await {
                Ok(started) => started.map(drop),
                Err(_) => Err(Status::deadline_exceeded("the command was not started")),
            }
        };
        let started = tokio::spawn(start.in_current_span())
            .map(|done| done.unwrap_or_else(|error| Err(Status::internal(error.to_string()))))
            .boxed()
            .shared();
        Self { agent: agent.clone(), container_id, process_id, started, ended: false }
    }

    /// Returns once it runs.
    pub(crate) async fn runs(&self) -> Result<(), agent::Error> {
        let started = self.started.clone();
        self.agent.call("exec", async move |_| started.await.map(Response::new)).await
    }

    /// Leaves the command to whoever has its streams: it ends by them.
    pub(crate) fn leave(mut self) {
        self.ended = true;
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        // At the end of huskd there is nobody left to do it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.ended {
            return;
        }
        let (agent, started) = (self.agent.clone(), self.started.clone());
        let kill = SignalProcessRequest {
            container_id: std::mem::take(&mut self.container_id),
            process_id: std::mem::take(&mut self.process_id),
            signal: libc::SIGKILL.unsigned_abs(),
            all: false,
        };
        let kill = async move {
            match started.await {
                // The command does not run.
                Err(status) if status.code() != Code::DeadlineExceeded => return,
                _ => {}
            }
            if let Err(error) = agent.call("kill", async |mut agent| agent.signal_process(kill).await).await {
                tracing::warn!(%error, "failed to kill a command that nobody waits for");
            }
        };
        runtime.spawn(kill.in_current_span());
    }
}
