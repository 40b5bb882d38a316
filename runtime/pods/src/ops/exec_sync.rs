//! A command in a container, with all that it said as the answer. It is killed when
//! its time is over, and when its caller has gone.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_agent_client::Agent;
use husk_base::lock;
use husk_proto::agent::ExecProcessRequest;
use husk_proto::agent::stream::{Kind, StreamHeader};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::command::{Command, process_id};
use super::ready::pod_of_running;
use crate::{Error, Node};

/// Most bytes that the commands of all callers hold together.
const MAX_HELD: usize = 128 * 1024 * 1024;

/// Bytes that are left of [`MAX_HELD`].
static HELD: Semaphore = Semaphore::const_new(MAX_HELD);

/// Most bytes that are read at a time.
const PIECE: usize = 16 * 1024;

/// Output of a command, and its end.
#[derive(Debug)]
pub struct Output {
    /// All that the command wrote to its standard output.
    pub stdout: Vec<u8>,
    /// All that the command wrote to its standard error.
    pub stderr: Vec<u8>,
    /// The exit code of the command.
    pub exit_code: i32,
}

/// Runs a command in a container, for at most `limit`. Of its output `max_output`
/// bytes are kept, of stdout and stderr together; the rest is read and dropped, so
/// that the command does not stall. Whoever drops this drops the command with it.
///
/// # Errors
/// A container that does not run, a command that cannot be started or does not end
/// in time.
pub async fn exec_sync(
    node: &Arc<Node>,
    container_id: &str,
    args: Vec<String>,
    limit: Option<Duration>,
    max_output: usize,
) -> Result<Output, Error> {
    let (sandbox, container) = node.registry.container(container_id)?;
    if args.is_empty() {
        return Err(Error::Invalid("exec: no command".into()));
    }
    let running = pod_of_running("exec", &sandbox, &container)?;
    let start = ExecProcessRequest {
        container_id: container.id.to_string(),
        process_id: process_id(),
        args,
        terminal: false,
        stdin: false,
    };
    run(&running.agent, start, limit, max_output, &HELD).await
}

async fn run(
    agent: &Agent,
    start: ExecProcessRequest,
    limit: Option<Duration>,
    max_output: usize,
    held: &Semaphore,
) -> Result<Output, Error> {
    let mut command = Command::start(agent, start);
    let answer = command.answer(max_output, held);
    let Some(limit) = limit else { return answer.await };
    tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| {
        Err(Error::Timeout(format!(
            "exec: the command did not end within {} s and is killed",
            limit.as_secs()
        )))
    })
}

impl Command {
    /// The command's output, once it has ended.
    async fn answer(&mut self, max_output: usize, held: &Semaphore) -> Result<Output, Error> {
        self.runs().await?;
        let room = Mutex::new(Room { answer: max_output, node: held, held: None });
        let (stdout, stderr, exit_code) =
            tokio::try_join!(self.read(Kind::Stdout, &room), self.read(Kind::Stderr, &room), self.wait())?;
        self.ended = true;
        Ok(Output { stdout, stderr, exit_code })
    }

    async fn read(&self, kind: Kind, room: &Mutex<Room<'_>>) -> Result<Vec<u8>, Error> {
        let failed =
            |error: std::io::Error| Error::Broken(format!("exec: read {kind:?} of the command: {error}"));
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
            Error::Full(format!(
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
    use husk_agent_client::fake::Fake;

    use super::*;

    const MAX_OUTPUT: usize = 1 << 20;

    const TEST_LIMIT: Duration = Duration::from_secs(20);

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
        tokio::time::timeout(TEST_LIMIT, fake.signals(1)).await.unwrap()
    }

    #[tokio::test]
    async fn an_answer_holds_as_much_of_both_outputs_as_it_has_room_for() {
        let much = vec![b'x'; MAX_OUTPUT * 3 / 4];
        let fake = Fake { stdout: much.clone(), stderr: much, ..Fake::default() };
        let (fake, agent, _folder) = serve(fake, TEST_LIMIT).await;
        let held = Semaphore::new(MAX_HELD);
        let answer = run(&agent, command(), Some(TEST_LIMIT), MAX_OUTPUT, &held).await.unwrap();
        assert_eq!(answer.stdout.len() + answer.stderr.len(), MAX_OUTPUT);
        assert_eq!(held.available_permits(), MAX_HELD, "all is given back");
        assert_eq!(lock(&fake.signals).len(), 0, "it ended by itself");
    }

    #[tokio::test]
    async fn what_would_be_too_much_for_the_node_is_refused_and_killed() {
        let fake = Fake { stdout: vec![b'x'; 3000], endless: true, ..Fake::default() };
        let (fake, agent, _folder) = serve(fake, TEST_LIMIT).await;
        let held = Semaphore::new(2000);
        let error = run(&agent, command(), None, MAX_OUTPUT, &held).await.unwrap_err();
        assert!(matches!(error, Error::Full(_)), "{error}");
        assert_eq!(kills(&fake).await, [("e".to_owned(), 9)]);
        assert_eq!(held.available_permits(), 2000);
    }

    #[tokio::test]
    async fn a_command_is_killed_when_its_caller_has_gone() {
        let (fake, agent, _folder) = serve(Fake { endless: true, ..Fake::default() }, TEST_LIMIT).await;
        let call = tokio::spawn(async move { run(&agent, command(), None, MAX_OUTPUT, &HELD).await });
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
        for (limit, agent_limit) in [(Some(short), TEST_LIMIT), (None, short)] {
            let fake = Fake { start_takes: Duration::from_secs(1), endless: true, ..Fake::default() };
            let (fake, agent, _folder) = serve(fake, agent_limit).await;
            let error = run(&agent, command(), limit, MAX_OUTPUT, &HELD).await.unwrap_err();
            let late = match &error {
                Error::Agent(error) => error.status.code() == tonic::Code::DeadlineExceeded,
                error => matches!(error, Error::Timeout(_)),
            };
            assert!(late, "{error}");
            assert_eq!(lock(&fake.signals).len(), 0, "it does not run yet");
            assert_eq!(kills(&fake).await, [("e".to_owned(), 9)]);
        }
    }

    #[tokio::test]
    async fn a_command_without_streams_is_killed() {
        let fake = Fake { without_streams: true, endless: true, ..Fake::default() };
        let (fake, agent, _folder) = serve(fake, TEST_LIMIT).await;
        let error = run(&agent, command(), None, MAX_OUTPUT, &HELD).await.unwrap_err().to_string();
        assert!(error.contains("out of streams"), "{error}");
        assert_eq!(kills(&fake).await, [("e".to_owned(), 9)]);
    }
}
