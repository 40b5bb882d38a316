//! Copies an output of a container into its log and to those who are attached.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::stream::Kind;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::LogFile;
use super::lines::{MAX_LINE, Pieces};
use crate::model::fanout::Fanout;

/// How much may be in the log before the agent hears of it: a part of what it keeps.
const CONFIRM_BYTES: u64 = 32 * 1024;

/// How long a few bytes may be in the log before the agent hears of them.
const CONFIRM_LATEST: Duration = Duration::from_millis(100);

/// One output of a container, and where it goes.
#[derive(Clone, Copy)]
pub(crate) struct Copying<'a> {
    /// The stream.
    pub kind: Kind,
    /// The log, if there is one.
    pub log: Option<&'a Arc<LogFile>>,
    /// The clients that are attached.
    pub attached: &'a Fanout,
    /// No more is waited for.
    pub enough: &'a CancellationToken,
}

/// The agent's knowledge of the bytes in the log.
struct Confirmations<W> {
    /// The way to an agent that wants to know.
    to: Option<W>,
    confirmed: u64,
    /// When it is to be told, if it has not been told of all.
    due: Option<Instant>,
}

impl<W: AsyncWrite + Unpin> Confirmations<W> {
    /// The bytes up to `upto` are in the log.
    async fn note(&mut self, upto: u64, enough: &CancellationToken) {
        if self.to.is_none() || upto <= self.confirmed {
            return;
        }
        if upto - self.confirmed >= CONFIRM_BYTES {
            return self.send(upto, enough).await;
        }
        self.due.get_or_insert_with(|| Instant::now() + CONFIRM_LATEST);
    }

    /// Tells the agent. One that has gone asks for nothing.
    async fn send(&mut self, upto: u64, enough: &CancellationToken) {
        self.due = None;
        if let Some(to) = &mut self.to
            && upto > self.confirmed
        {
            self.confirmed = upto;
            let number = upto.to_be_bytes();
            tokio::select! {
                biased;
                _ = to.write_all(&number) => {}
                () = enough.cancelled() => {}
            }
        }
    }

    async fn due(&self) {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
    }
}

impl Copying<'_> {
    /// Copies until the stream ends or breaks, or no more is waited for. The first byte of
    /// `from` has the number `start`, and the agent is told on `confirm` how much is in
    /// the log. A log that cannot be written (a full disk) loses text, never blocks the
    /// container. Answers with how many bytes there were, and how the stream ended.
    pub(crate) async fn run(
        self,
        mut from: impl AsyncRead + Unpin,
        confirm: Option<impl AsyncWrite + Unpin>,
        start: u64,
    ) -> (u64, io::Result<()>) {
        let mut pieces = Pieces::default();
        let mut confirmations = Confirmations { to: confirm, confirmed: start, due: None };
        let mut at = start;
        let mut buffer = vec![0u8; MAX_LINE];
        let mut entry = Vec::new();
        let mut complained = false;
        loop {
            let read = tokio::select! {
                biased;
                () = self.enough.cancelled() => Ok(0),
                read = from.read(&mut buffer) => read,
                () = confirmations.due() => {
                    confirmations.send(self.logged(at, &pieces), self.enough).await;
                    continue;
                }
            };
            let length = *read.as_ref().unwrap_or(&0);
            let bytes = buffer.get(..length).unwrap_or_default();
            entry.clear();
            if bytes.is_empty() {
                pieces.finish(self.kind.name(), &mut entry);
            } else {
                pieces.push(bytes, self.kind.name(), &mut entry);
            }
            at = at.saturating_add(length as u64);
            self.write(&entry, self.logged(at, &pieces), &mut complained).await;
            if bytes.is_empty() {
                confirmations.send(at, self.enough).await;
                return (at.saturating_sub(start), read.map(drop));
            }
            confirmations.note(self.logged(at, &pieces), self.enough).await;
            self.attached.publish(bytes).await;
        }
    }

    /// How much of the stream is where it belongs, when `at` bytes of it were read.
    fn logged(&self, at: u64, pieces: &Pieces) -> u64 {
        if self.log.is_some() { at.saturating_sub(pieces.waiting()) } else { at }
    }

    async fn write(&self, entry: &[u8], upto: u64, complained: &mut bool) {
        let Some(log) = self.log.filter(|_| !entry.is_empty()) else { return };
        match log.write(entry, self.kind, upto).await {
            Ok(()) => *complained = false,
            Err(error) if !*complained => {
                *complained = true;
                tracing::warn!(log = %log.path.display(), %error, "failed to write a container's log: its output is lost");
            }
            Err(_) => {}
        }
    }
}
