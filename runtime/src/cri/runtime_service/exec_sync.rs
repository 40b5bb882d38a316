//! ExecSync: runs a command in a container and answers with what it said. The
//! command is killed when its time is over, and when its caller has gone.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use husk_proto::agent::stream::{Kind, StreamHeader};
use husk_proto::agent::{ExecProcessRequest, SignalProcessRequest};
use husk_proto::cri::{ExecSyncRequest, ExecSyncResponse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Code, Response, Status};

use super::create_container::ready_machine;
use crate::agent::{self, Agent};
use crate::container::{Container, State};
use crate::cri::error::Error;
use crate::cri::serve::MAX_MESSAGE;
use crate::node::Node;
use crate::sandbox::{Sandbox, lock};
use crate::vm::Machine;

/// Most bytes of output that are kept, of stdout and stderr together: what one
/// message holds, less its frame. The rest is read and dropped, as CRI says, so
/// that the command does not stall.
const MAX_OUTPUT: usize = MAX_MESSAGE - 1024;

/// Most bytes that the commands of all callers hold together.
const MAX_HELD: usize = 128 * 1024 * 1024;

/// What is left of that.
static HELD: Semaphore = Semaphore::const_new(MAX_HELD);

/// Most bytes that are read at a time.
const PIECE: usize = 16 * 1024;

/// Most time until it is known whether a command was started, so that it can be
/// killed: longer than the agent waits for runc.
const LATE_START: Duration = Duration::from_secs(150);

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
    let start = ExecProcessRequest {
        container_id: container.id.to_string(),
        process_id: process_id(),
        args: request.cmd,
        terminal: false,
        stdin: false,
    };
    let limit = u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0);
    run(&machine.agent, start, limit.map(Duration::from_secs), &HELD).await
}

/// Whoever drops this drops the command with it.
async fn run(
    agent: &Agent,
    start: ExecProcessRequest,
    limit: Option<Duration>,
    held: &Semaphore,
) -> Result<ExecSyncResponse, Error> {
    let mut command = Command::start(agent, start);
    let answer = command.answer(held);
    let Some(limit) = limit else { return answer.await };
    tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| {
        Err(Error::DeadlineExceeded(format!(
            "exec: the command did not end within {} s and is killed",
            limit.as_secs()
        )))
    })
}

/// A command that is killed when nobody waits for it any more.
pub(super) struct Command {
    agent: Agent,
    container_id: String,
    process_id: String,
    /// The agent's word that it runs, or does not.
    started: Shared<BoxFuture<'static, Result<(), Status>>>,
    ended: bool,
}

impl Command {
    /// The agent goes on with a start whoever waits for it. So does this: it
    /// must be known what there is to kill.
    pub(super) fn start(agent: &Agent, request: ExecProcessRequest) -> Self {
        let (container_id, process_id) = (request.container_id.clone(), request.process_id.clone());
        let mut client = agent.unlimited();
        let start = async move {
            match tokio::time::timeout(LATE_START, client.exec_process(request)).await {
                Ok(started) => started.map(drop),
                Err(_) => Err(Status::deadline_exceeded("the command was not started")),
            }
        };
        let started = tokio::spawn(start)
            .map(|done| done.unwrap_or_else(|error| Err(Status::internal(error.to_string()))))
            .boxed()
            .shared();
        Self { agent: agent.clone(), container_id, process_id, started, ended: false }
    }

    /// Returns once it runs.
    pub(super) async fn runs(&self) -> Result<(), agent::Error> {
        let started = self.started.clone();
        self.agent.call("exec", async move |_| started.await.map(Response::new)).await
    }

    /// Its streams are somebody else's now: it ends by them.
    pub(super) fn leave(mut self) {
        self.ended = true;
    }

    /// What it said, once it has ended.
    async fn answer(&mut self, held: &Semaphore) -> Result<ExecSyncResponse, Error> {
        self.runs().await?;
        let room = Mutex::new(Room { answer: MAX_OUTPUT, node: held, held: None });
        let (stdout, stderr, exit_code) =
            tokio::try_join!(self.read(Kind::Stdout, &room), self.read(Kind::Stderr, &room), self.wait())?;
        self.ended = true;
        Ok(ExecSyncResponse { stdout, stderr, exit_code })
    }

    async fn read(&self, kind: Kind, room: &Mutex<Room<'_>>) -> Result<Vec<u8>, Error> {
        let failed =
            |error: std::io::Error| Error::Internal(format!("exec: read {kind:?} of the command: {error}"));
        let (container_id, process_id) = (self.container_id.clone(), self.process_id.clone());
        let header = StreamHeader { kind, container_id, process_id };
        let mut stream = self.agent.open_stream(&header).await.map_err(failed)?;
        let mut kept = Vec::new();
        let mut piece = Vec::with_capacity(PIECE);
        while stream.read_buf(&mut piece).await.map_err(failed)? > 0 {
            let count = lock(room).take(piece.len())?;
            kept.extend_from_slice(piece.get(..count).unwrap_or_default());
            piece.clear();
        }
        let _ = stream.shutdown().await;
        Ok(kept)
    }

    async fn wait(&self) -> Result<i32, Error> {
        Ok(self.agent.wait_process(&self.container_id, &self.process_id).await?.exit_code)
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
        runtime.spawn(async move {
            match started.await {
                // It does not run.
                Err(status) if status.code() != Code::DeadlineExceeded => return,
                _ => {}
            }
            let container = kill.container_id.clone();
            if let Err(error) = agent.call("kill", async |mut agent| agent.signal_process(kill).await).await {
                tracing::warn!(container, %error, "kill a command that nobody waits for");
            }
        });
    }
}

/// Room for the output of one command, given back with this.
struct Room<'a> {
    /// Bytes that its answer still has room for.
    answer: usize,
    /// Bytes that all commands together may still keep.
    node: &'a Semaphore,
    held: Option<SemaphorePermit<'a>>,
}

impl Room<'_> {
    /// How many of `bytes` are kept. The command ends if that is too many for
    /// the node: an answer says all that it has room for, or is none.
    fn take(&mut self, bytes: usize) -> Result<usize, Error> {
        let kept = bytes.min(self.answer);
        let permit = u32::try_from(kept).ok().and_then(|kept| self.node.try_acquire_many(kept).ok());
        let permit = permit.ok_or_else(|| {
            Error::ResourceExhausted(format!(
                "exec: the commands that run on this node have more than {} MiB of output waiting for their end: run \
                 fewer at a time, or have them write less",
                MAX_HELD >> 20
            ))
        })?;
        self.answer -= kept;
        match &mut self.held {
            Some(held) => held.merge(permit),
            None => self.held = Some(permit),
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use prost::Message;

    use super::*;
    use crate::agent::fake::Fake;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn command() -> ExecProcessRequest {
        ExecProcessRequest { container_id: "c".into(), process_id: "e".into(), ..Default::default() }
    }

    async fn serve(fake: Fake, timeout: Duration) -> (Arc<Fake>, Agent, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(fake);
        let agent = fake.serve(folder.path(), timeout).await;
        (fake, agent, folder)
    }

    async fn kills(fake: &Fake) -> Vec<(String, u32)> {
        tokio::time::timeout(PATIENCE, fake.signals(1)).await.unwrap()
    }

    #[tokio::test]
    async fn an_answer_holds_as_much_of_both_outputs_as_a_message_does() {
        let much = vec![b'x'; MAX_MESSAGE * 3 / 4];
        let fake = Fake { stdout: much.clone(), stderr: much, ..Fake::default() };
        let (fake, agent, _folder) = serve(fake, PATIENCE).await;
        let held = Semaphore::new(MAX_HELD);
        let answer = run(&agent, command(), Some(PATIENCE), &held).await.unwrap();
        assert_eq!(answer.stdout.len() + answer.stderr.len(), MAX_OUTPUT);
        assert!(answer.encoded_len() <= MAX_MESSAGE, "{}", answer.encoded_len());
        assert_eq!(held.available_permits(), MAX_HELD, "all is given back");
        assert_eq!(lock(&fake.signals).len(), 0, "it ended by itself");
    }

    #[tokio::test]
    async fn what_would_be_too_much_for_the_node_is_refused_and_killed() {
        let fake = Fake { stdout: vec![b'x'; 3000], endless: true, ..Fake::default() };
        let (fake, agent, _folder) = serve(fake, PATIENCE).await;
        let held = Semaphore::new(2000);
        let error = run(&agent, command(), None, &held).await.unwrap_err();
        assert_eq!(Status::from(error).code(), Code::ResourceExhausted);
        assert_eq!(kills(&fake).await, [("e".to_owned(), 9)]);
        assert_eq!(held.available_permits(), 2000);
    }

    #[tokio::test]
    async fn a_command_is_killed_when_its_caller_has_gone() {
        let (fake, agent, _folder) = serve(Fake { endless: true, ..Fake::default() }, PATIENCE).await;
        let call = tokio::spawn(async move { run(&agent, command(), None, &HELD).await });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!call.is_finished());
        assert_eq!(lock(&fake.signals).len(), 0);
        call.abort();
        assert_eq!(kills(&fake).await, [("e".to_owned(), 9)]);
    }

    #[tokio::test]
    async fn the_start_counts_too_and_what_has_started_too_late_is_killed() {
        // First the caller's limit passes, then huskd's for the agent.
        let short = Duration::from_millis(300);
        for (limit, agent_limit) in [(Some(short), PATIENCE), (None, short)] {
            let fake = Fake { start_takes: Duration::from_secs(1), endless: true, ..Fake::default() };
            let (fake, agent, _folder) = serve(fake, agent_limit).await;
            let error = run(&agent, command(), limit, &HELD).await.unwrap_err();
            assert_eq!(Status::from(error).code(), Code::DeadlineExceeded);
            assert_eq!(lock(&fake.signals).len(), 0, "it does not run yet");
            assert_eq!(kills(&fake).await, [("e".to_owned(), 9)]);
        }
    }

    #[tokio::test]
    async fn a_command_without_streams_is_killed() {
        let fake = Fake { without_streams: true, endless: true, ..Fake::default() };
        let (fake, agent, _folder) = serve(fake, PATIENCE).await;
        let error = run(&agent, command(), None, &HELD).await.unwrap_err().to_string();
        assert!(error.contains("out of streams"), "{error}");
        assert_eq!(kills(&fake).await, [("e".to_owned(), 9)]);
    }
}
