//! Pumps: move the bytes of one standard stream between a process and the client that the
//! host has connected, and end at the right time.
//!
//! An output is read one chunk ahead of its client and no further: the rest waits in the
//! process's pipe, which blocks the process when it is full. Once the process has ended, its
//! output ends at end-of-file, or earlier:
//!
//! | [`OutputOwner`] | if children keep the stream open   | if a client takes nothing            |
//! | --------------- | ---------------------------------- | ------------------------------------ |
//! | `Container`     | waits for [`LINGER`]               | waits; another client may still come |
//! | `Command`       | waits for them                     | waits while the client is there      |
//! | `Session`       | waits for [`LINGER`]               | waits while the client is there      |
//!
//! The last output of a container, which is in its pipe, is kept until a client takes it or
//! the container is removed: huskd may be away for long. Waiters for the container's end
//! continue after [`CLIENT_TIMEOUT`].

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::select;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::process::fd::AsyncFile;
use crate::process::reaper::Exited;

/// How long after a process's end other processes may hold its streams open.
const LINGER: Duration = Duration::from_secs(2);

/// How long after a container's end its output may wait for a client before it
/// counts as kept.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long after a command's end its output waits for a client: longer than
/// huskd takes to open both streams, if it does.
const UNCLAIMED: Duration = Duration::from_secs(60);

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

impl OutputOwner {
    const fn has_one_client(self) -> bool {
        matches!(self, Self::Command | Self::Session)
    }

    const fn ends_without_its_children(self) -> bool {
        matches!(self, Self::Container | Self::Session)
    }
}

/// The end of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The stream ended, or nobody can want the rest.
    Over,
    /// The only client has gone, while the process could have written more.
    Abandoned,
}

/// A connection for standard input.
pub struct Input<C> {
    /// The client's connection.
    pub connection: C,
    /// The bytes that came together with the connection's header.
    pub early: Vec<u8>,
}

/// Sends the bytes of `source` to the newest of `clients`, until the source ends,
/// or until the first client of a command has gone. The connection is then
/// closed, which is the end of the stream. `kept` becomes true when a container
/// has ended and nobody takes its last output.
pub async fn output<C>(
    source: AsyncFile,
    mut clients: mpsc::Receiver<C>,
    owner: OutputOwner,
    exited: Exited,
    kept: watch::Sender<bool>,
) -> End
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let opened = Instant::now();
    let mut client = None;
    let mut late = LATE_BYTES;
    while late > 0 {
        let unclaimed = owner.has_one_client() && client.is_none();
        let chunk = select! {
            biased;
            newer = clients.recv() => match newer {
                Some(newer) => {
                    client = Some(newer);
                    continue;
                }
                None => return End::Over,
            },
            chunk = source.read(CHUNK) => chunk,
            () = gone(client.as_mut()), if owner.has_one_client() => return End::Abandoned,
            () = after_exit(exited.clone(), opened, LINGER), if owner.ends_without_its_children() => break,
            () = after_exit(exited.clone(), opened, UNCLAIMED), if unclaimed => return End::Over,
        };
        match chunk {
            Ok(chunk) if chunk.is_empty() => break,
            Ok(chunk) => {
                if !deliver(&chunk, &mut client, &mut clients, owner, &exited, &kept).await {
                    return End::Over;
                }
                if owner.has_one_client() && client.is_none() {
                    return End::Abandoned;
                }
                let ended = exited.borrow().as_ref().map(|exit| exit.instant);
                if owner.ends_without_its_children() && ended.is_some_and(|ended| ended.elapsed() > LINGER) {
                    late = late.saturating_sub(chunk.len());
                }
            }
            Err(error) => {
                tracing::warn!(%error, "failed to read a process's output");
                break;
            }
        }
    }
    if let Some(mut client) = client {
        // A client that has gone cannot be told of the end.
        let _ = client.shutdown().await;
    }
    End::Over
}

/// Waits until the client of an output closes. It sends nothing.
async fn gone<C: AsyncRead + Unpin>(client: Option<&mut C>) {
    match client {
        Some(client) => while !matches!(client.read(&mut [0; 16]).await, Ok(0) | Err(_)) {},
        None => std::future::pending().await,
    }
}

/// Writes all of `chunk` to the client; false when nobody can take it any more. A
/// command has no other client than its first. That one may take its time:
/// truncated output would look complete to it.
async fn deliver<C>(
    mut chunk: &[u8],
    client: &mut Option<C>,
    clients: &mut mpsc::Receiver<C>,
    owner: OutputOwner,
    exited: &Exited,
    kept: &watch::Sender<bool>,
) -> bool
where
    C: AsyncWrite + Unpin,
{
    let mut progress = Instant::now();
    while !chunk.is_empty() {
        let patience = match (owner, &client) {
            (OutputOwner::Container, _) => (!*kept.borrow()).then_some(CLIENT_TIMEOUT),
            (OutputOwner::Command | OutputOwner::Session, None) => Some(UNCLAIMED),
            (OutputOwner::Command | OutputOwner::Session, Some(_)) => None,
        };
        let write = async {
            match client.as_mut() {
                Some(client) => client.write(chunk).await,
                None => std::future::pending().await,
            }
        };
        select! {
            biased;
            newer = clients.recv() => match newer {
                Some(newer) => *client = Some(newer),
                None => return false,
            },
            written = write => match written {
                Ok(count) if count > 0 => {
                    chunk = chunk.get(count..).unwrap_or_default();
                    progress = Instant::now();
                }
                // The client is gone; another may come for the rest.
                _ if owner.has_one_client() => {
                    *client = None;
                    return true;
                }
                _ => *client = None,
            },
            () = after_exit(exited.clone(), progress, patience.unwrap_or_default()), if patience.is_some() => {
                if owner.has_one_client() {
                    tracing::warn!("dropped the last output of a command, which no client has taken");
                    return false;
                }
                tracing::info!("kept the last output of a container, which no client has taken");
                kept.send_replace(true);
            }
        }
    }
    true
}

/// Sends the bytes of the newest of `clients` to `sink`, until the process ends
/// or, with `once`, the first client has finished. `sink` is then closed.
pub async fn input<C>(sink: AsyncFile, mut clients: mpsc::Receiver<Input<C>>, once: bool, exited: Exited)
where
    C: AsyncRead + Unpin,
{
    let opened = Instant::now();
    let mut waiting = None;
    loop {
        let next = match waiting.take() {
            Some(client) => Some(client),
            None => select! {
                client = clients.recv() => client,
                () = after_exit(exited.clone(), opened, Duration::ZERO) => None,
            },
        };
        let Some(client) = next else { return };
        let copied = select! {
            biased;
            () = after_exit(exited.clone(), opened, Duration::ZERO) => return,
            newer = clients.recv() => {
                waiting = newer;
                continue;
            }
            copied = feed(&sink, client) => copied,
        };
        if once || copied.is_err() {
            return;
        }
    }
}

/// Copies one client's bytes to the process. An error means that the process
/// reads no more.
async fn feed<C>(sink: &AsyncFile, client: Input<C>) -> std::io::Result<()>
where
    C: AsyncRead + Unpin,
{
    let Input { mut connection, early } = client;
    write_all(sink, &early).await?;
    drop(early);
    let mut buffer = vec![0; CHUNK];
    loop {
        match connection.read(&mut buffer).await {
            Ok(count) if count > 0 => write_all(sink, buffer.get(..count).unwrap_or_default()).await?,
            // A broken connection ends the input like one that was closed.
            _ => return Ok(()),
        }
    }
}

async fn write_all(sink: &AsyncFile, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let count = sink.write(bytes).await?;
        bytes = bytes.get(count..).unwrap_or_default();
    }
    Ok(())
}

/// Resolves `wait` after the process's end, or after `since` if that is later.
async fn after_exit(mut exited: Exited, since: Instant, wait: Duration) {
    let ended = match exited.wait_for(Option::is_some).await {
        Ok(exit) => exit.as_ref().map(|exit| exit.instant),
        Err(_) => None,
    };
    sleep_until(ended.map_or(since, |ended| ended.max(since)) + wait).await;
}

#[cfg(test)]
mod tests;
