//! Pumps: move the bytes of one standard stream between a process and the client that the
//! host has connected, and end at the right time.
//!
//! An output of a command is read one chunk ahead of its client and no further, and that of
//! a container as far as [`Retained`] has room for what its client has not confirmed: the
//! rest waits in the process's pipe, which blocks the process when it is full. Once the
//! process has ended, its output ends at end-of-file, or earlier:
//!
//! | [`OutputOwner`] | if children keep the stream open   | if a client takes nothing            |
//! | --------------- | ---------------------------------- | ------------------------------------ |
//! | `Container`     | waits for [`LINGER`]               | waits; another client may still come |
//! | `Command`       | waits for them                     | waits while the client is there      |
//! | `Session`       | waits for [`LINGER`]               | waits while the client is there      |
//!
//! Output of a container that was sent and not confirmed is sent again to the next client:
//! huskd may die between the two. The last output of a container is kept until a client has
//! confirmed it or the container is removed: huskd may be away for long. Waiters for the
//! container's end continue after [`CLIENT_TIMEOUT`].

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::process::fd::AsyncFile;
use crate::process::reaper::Exited;

mod command;
mod container;
mod input;
mod retained;

pub use input::{Input, input};

#[cfg(doc)]
use retained::Retained;

/// How long after a process's end other processes may hold its streams open.
const LINGER: Duration = Duration::from_secs(2);

/// How long after a container's end its output may wait for a client before it
/// counts as kept.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Most bytes read after [`LINGER`], from a pipe that never runs dry. A pipe
/// holds fewer.
const LATE_BYTES: usize = 1024 * 1024;

const CHUNK: usize = 16 * 1024;

/// The owner of an output, which determines its clients and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputOwner {
    /// A container: clients come and go, and its children end with it.
    Container,
    /// A command: its first client is the only one.
    Command,
    /// A command with a terminal, which its children lose when it ends.
    Session,
}

/// The end of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The stream ended, or nobody can want the rest.
    Over,
    /// The only client has gone, while the process could have written more.
    Abandoned,
}

/// A connection for an output.
pub struct OutputClient<C> {
    /// The client's connection.
    pub connection: C,
    /// The number of the first byte that the client does not have, if it confirms what it
    /// has written. To any other, what was sent counts as confirmed.
    pub from: Option<u64>,
}

/// Sends the bytes of `source` to the newest of `clients`, until the source ends,
/// or until the first client of a command has gone. The connection is then
/// closed, which is the end of the stream. `kept` becomes true when a container
/// has ended and nobody takes its last output.
pub async fn output<C>(
    source: AsyncFile,
    clients: mpsc::Receiver<OutputClient<C>>,
    owner: OutputOwner,
    exited: Exited,
    kept: watch::Sender<bool>,
) -> End
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    match owner {
        OutputOwner::Container => {
            container::output(source, clients, exited, kept).await;
            End::Over
        }
        OutputOwner::Command => command::output(source, clients, false, exited).await,
        OutputOwner::Session => command::output(source, clients, true, exited).await,
    }
}

/// Resolves `wait` after the process's end, or after `since` if that is later.
async fn after_exit(mut exited: Exited, since: Instant, wait: Duration) {
    let ended = match exited.wait_for(Option::is_some).await {
        Ok(exit) => exit.as_ref().map(|exit| exit.instant),
        Err(_) => None,
    };
    sleep_until(ended.map_or(since, |ended| ended.max(since)) + wait).await;
}

/// How long ago the process has ended; `None` if it has not.
fn ended_for(exited: &Exited) -> Option<Duration> {
    exited.borrow().as_ref().map(|exit| exit.instant.elapsed())
}

#[cfg(test)]
mod tests;
