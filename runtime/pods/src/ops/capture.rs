//! Captures a container's output: from its streams into its log, and to whoever
//! is attached.
//!
//! A stream may end or break before its container does: the program has closed
//! it, or a connection was lost. Either way it is asked for again, at a growing
//! pause, until the container has ended and nothing more comes: from the first byte
//! on that is not in the log. The agent keeps what was not confirmed.

use std::sync::Arc;
use std::time::Duration;

use husk_agent_client::{Agent, Output};
use husk_proto::agent::stream::{Kind, OutputHeader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::model::Container;
use crate::model::fanout::Fanout;
use crate::model::log::Copying;

/// Most time between the agent's word that a container has ended and the last
/// byte of its output.
const LAST_BYTES: Duration = Duration::from_secs(10);

/// How soon a stream that ended or broke is asked for again, and then twice as
/// long each time.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// The longest pause between two tries.
const AT_THE_LATEST: Duration = Duration::from_secs(60);

/// The rest of a container's output once the container has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing: it was handed over to its last byte.
    None,
    /// Something that nobody has taken; the agent keeps it.
    Kept,
}

/// The streams of one container, being copied.
pub struct Capture {
    streams: JoinSet<()>,
    rest: watch::Sender<Option<Rest>>,
    /// No more is waited for.
    enough: CancellationToken,
}

/// Which streams a container has.
fn kinds(container: &Container) -> &'static [Kind] {
    if container.record().config.tty { &[Kind::Stdout] } else { &[Kind::Stdout, Kind::Stderr] }
}

impl Capture {
    /// Opens the streams of a new container, and begins to copy them.
    ///
    /// # Errors
    /// A stream that cannot be opened.
    pub async fn start(agent: &Agent, container: &Arc<Container>) -> std::io::Result<Self> {
        let mut opened = Vec::new();
        for kind in kinds(container) {
            opened.push(Some(agent.open_output(&header(container, *kind, 0)).await?));
        }
        Ok(Self::of(agent, container, opened))
    }

    /// Goes on where an earlier huskd left off.
    pub async fn resume(agent: &Agent, container: &Arc<Container>) -> Self {
        let mut opened = Vec::new();
        for kind in kinds(container) {
            let from = container.log().map_or(0, |log| log.taken(*kind));
            let stream = agent.open_output(&header(container, *kind, from)).await.inspect_err(|error| {
                tracing::warn!(%error, "failed to open an output of a container; it is asked for again");
            });
            opened.push(stream.ok());
        }
        Self::of(agent, container, opened)
    }

    fn of(agent: &Agent, container: &Arc<Container>, opened: Vec<Option<Output>>) -> Self {
        let (rest, told) = watch::channel(None);
        let enough = CancellationToken::new();
        let mut streams = JoinSet::new();
        for (kind, opened) in kinds(container).iter().zip(opened) {
            let (agent, container) = (agent.clone(), container.clone());
            let stream = Stream { agent, container, kind: *kind, rest: told.clone(), enough: enough.clone() };
            streams.spawn(stream.copy(opened).in_current_span());
        }
        if kinds(container).len() == 1 {
            container.output.stderr.end();
        }
        Self { streams, rest, enough }
    }

    /// Returns once all that the container has said is in the log, or all of it
    /// that comes within [`LAST_BYTES`] of the word of its end; false then.
    pub async fn finish(mut self, rest: Rest) -> bool {
        self.rest.send_replace(Some(rest));
        let drained = async |streams: &mut JoinSet<_>| while streams.join_next().await.is_some() {};
        let whole = timeout(LAST_BYTES, drained(&mut self.streams)).await.is_ok();
        // A stream that still waits then waits for its connection alone.
        self.enough.cancel();
        drained(&mut self.streams).await;
        whole
    }
}

fn header(container: &Container, kind: Kind, from: u64) -> OutputHeader {
    OutputHeader { kind, container_id: container.id.to_string(), from }
}

/// One of the streams.
struct Stream {
    agent: Agent,
    container: Arc<Container>,
    kind: Kind,
    rest: watch::Receiver<Option<Rest>>,
    enough: CancellationToken,
}

impl Stream {
    /// Copies it to its end, beginning with a connection that is there already.
    async fn copy(mut self, mut opened: Option<Output>) {
        let container = self.container.clone();
        let attached = match self.kind {
            Kind::Stderr => &container.output.stderr,
            _ => &container.output.stdout,
        };
        let mut from = container.log().map_or(0, |log| log.taken(self.kind));
        let mut pause = ASK_AGAIN;
        loop {
            if let Some(output) = opened.take() {
                // A stream that is opened after the end has its bytes at once, or none.
                let had_ended = self.rest.borrow().is_some();
                let (bytes, ended) = self.copy_one(output, &mut from, attached).await;
                if had_ended && bytes == 0 && ended.is_ok() {
                    break;
                }
                if bytes > 0 {
                    pause = ASK_AGAIN;
                }
            }
            if !self.is_to_go_on(pause).await {
                break;
            }
            pause = (pause * 2).min(AT_THE_LATEST);
            let header = header(&container, self.kind, from);
            let again = tokio::select! {
                again = self.agent.open_output(&header) => again,
                () = self.enough.cancelled() => break,
            };
            match again {
                Ok(output) => opened = Some(output),
                Err(error) => {
                    tracing::debug!(%error, "failed to open an output of a container again");
                }
            }
        }
        attached.end();
    }

    /// Copies what one connection brings. `from` is the number of the byte that follows
    /// what was had before, and then of the one that follows this.
    async fn copy_one(
        &self,
        output: Output,
        from: &mut u64,
        attached: &Fanout,
    ) -> (u64, std::io::Result<()>) {
        let log = self.container.log();
        let copying = Copying { kind: self.kind, log: log.as_ref(), attached, enough: &self.enough };
        let (bytes, ended) = match output {
            Output::Ended => (0, Ok(())),
            Output::Unconfirmed(stream) => copying.run(stream, None::<OwnedWriteHalf>, *from).await,
            Output::Confirmed(stream, start) => {
                if let Some(log) = &log {
                    if start > *from {
                        let lost = start - *from;
                        tracing::info!(lost, "an earlier huskd took output of which the log does not tell");
                    }
                    log.begin(self.kind, start);
                }
                *from = start;
                let (stream, confirm) = stream.into_split();
                copying.run(stream, Some(confirm), start).await
            }
        };
        *from = from.saturating_add(bytes);
        (bytes, ended)
    }

    /// Waits for a while, or until the container has ended; false when there is
    /// no more to come.
    async fn is_to_go_on(&mut self, pause: Duration) -> bool {
        let had_ended = self.rest.borrow().is_some();
        let rest = &mut self.rest;
        tokio::select! {
            biased;
            () = self.enough.cancelled() => return false,
            ended = rest.wait_for(Option::is_some), if !had_ended => if ended.is_err() { return false },
            () = sleep(if had_ended { pause.min(ASK_AGAIN) } else { pause }) => {}
        }
        *self.rest.borrow() != Some(Rest::None)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use husk_agent_client::fake::Fake;

    use super::*;
    use crate::model::log::LogFile;
    use crate::model::{Events, Exit, State};
    use crate::ops::supervise::{follow, resume};
    use crate::test_util::{pod_of, running};

    const SOON: Duration = Duration::from_secs(20);

    fn logged(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().filter_map(|line| Some(line.split_once(' ')?.1.to_owned())).collect()
    }

    #[tokio::test]
    async fn a_container_is_followed_to_its_end_whatever_breaks_on_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake {
            stdout: b"first\n".to_vec(),
            more: Some(b"later\n".to_vec()),
            endless: true,
            exit_code: 3,
            ..Fake::default()
        });
        let pod = pod_of(fake.serve(folder.path(), SOON).await);
        let (sandbox, container) = running(folder.path(), "p", Events::default()).await;
        let path = folder.path().join("0.log");
        container.set_log(Some(Arc::new(LogFile::open(folder.path(), &path, None).unwrap())));
        follow(&sandbox, &pod, &container).await.unwrap();
        let has = async |lines: &[&str]| {
            let met = async {
                while logged(&path) != lines {
                    sleep(Duration::from_millis(10)).await;
                }
            };
            timeout(SOON, met).await.unwrap();
        };
        has(&["stdout F first"]).await;
        fake.broken.send_replace(());
        has(&["stdout F first", "stdout F later"]).await;
        fake.killed.send_replace(true);
        timeout(SOON, container.wait_exited()).await.unwrap();
        assert!(matches!(container.record().state, State::Exited(Exit { code: 3, .. })));
        assert_eq!(logged(&path).len(), 2);
    }

    /// A huskd dies again and again while a container speaks, each time with some output on
    /// its way, and the log is rotated meanwhile: each line is in it once, in order.
    #[tokio::test]
    async fn nothing_is_lost_or_repeated_when_huskd_dies() {
        let folder = tempfile::tempdir().unwrap();
        let said: String = (0..60_000).map(|line| format!("line {line}\n")).collect();
        let fake = Arc::new(Fake { stdout: said.into_bytes(), endless: true, ..Fake::default() });
        let pod = pod_of(fake.serve(folder.path(), SOON).await);
        let (sandbox, container) = running(folder.path(), "p", Events::default()).await;
        let (path, position) = (folder.path().join("0.log"), folder.path().join("position"));
        let open = || Arc::new(LogFile::open(folder.path(), &path, Some(&position)).unwrap());
        for death in 0..20 {
            container.set_log(Some(open()));
            let capture = Capture::resume(&pod.agent, &container).await;
            sleep(Duration::from_micros(300 * death)).await;
            drop(capture);
            // The tasks end where they wait: with bytes that were read, and not written.
            sleep(Duration::from_millis(5)).await;
            if death % 4 == 1 {
                std::fs::rename(&path, folder.path().join(format!("0.log.{death:02}"))).unwrap();
            }
            if death % 8 == 5 {
                open();
            }
        }
        container.set_log(Some(open()));
        resume(&sandbox, &pod, &container).await;
        fake.killed.send_replace(true);
        timeout(SOON, container.wait_exited()).await.unwrap();
        let mut files: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| {
                path.extension().is_some_and(|end| end != "log") && path.to_string_lossy().contains("0.log")
            })
            .collect();
        files.sort();
        files.push(path);
        assert_eq!(files.len(), 6);
        let lines: Vec<_> = files.iter().flat_map(|file| logged(file)).collect();
        let expected: Vec<_> = (0..60_000).map(|line| format!("stdout F line {line}")).collect();
        let wrong = lines.iter().zip(&expected).position(|(is, expected)| is != expected);
        assert_eq!((lines.len(), wrong), (expected.len(), None));
    }

    #[tokio::test]
    async fn what_the_agent_has_kept_is_fetched_when_its_container_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake { stdout: b"last words\n".to_vec(), output_kept: true, ..Fake::default() });
        let pod = pod_of(fake.serve(folder.path(), SOON).await);
        let (sandbox, container) = running(folder.path(), "p", Events::default()).await;
        let path = folder.path().join("0.log");
        container.set_log(Some(Arc::new(LogFile::open(folder.path(), &path, None).unwrap())));
        resume(&sandbox, &pod, &container).await;
        timeout(SOON, container.wait_exited()).await.unwrap();
        assert!(logged(&path).contains(&"stdout F last words".to_owned()));
    }
}
