//! The output of a command, whose first client is the only one.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::select;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{CHUNK, End, LATE_BYTES, LINGER, OutputClient, after_exit, ended_for};
use crate::process::fd::AsyncFile;
use crate::process::reaper::Exited;

/// How long after a command's end its output waits for a client: longer than
/// huskd takes to open both streams, if it does.
pub(super) const UNCLAIMED: Duration = Duration::from_secs(60);

/// Sends the bytes of `source` to the client, until the source ends or the client has
/// gone. The connection is then closed, which is the end of the stream. A `session` ends
/// without the command's children.
pub(super) async fn output<C>(
    source: AsyncFile,
    mut clients: mpsc::Receiver<OutputClient<C>>,
    session: bool,
    exited: Exited,
) -> End
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let opened = Instant::now();
    let mut client = None;
    let mut late = LATE_BYTES;
    while late > 0 {
        let unclaimed = client.is_none();
        let chunk = select! {
            biased;
            newer = clients.recv() => match newer {
                Some(newer) => {
                    client = Some(newer.connection);
                    continue;
                }
                None => return End::Over,
            },
            chunk = source.read(CHUNK) => chunk,
            () = gone(client.as_mut()) => return End::Abandoned,
            () = after_exit(exited.clone(), opened, LINGER), if session => break,
            () = after_exit(exited.clone(), opened, UNCLAIMED), if unclaimed => return End::Over,
        };
        match chunk {
            Ok(chunk) if chunk.is_empty() => break,
            Ok(chunk) => {
                if !deliver(&chunk, &mut client, &mut clients, &exited).await {
                    return End::Over;
                }
                if client.is_none() {
                    return End::Abandoned;
                }
                if session && ended_for(&exited) > Some(LINGER) {
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

/// Waits until the client closes. It sends nothing.
async fn gone<C: AsyncRead + Unpin>(client: Option<&mut C>) {
    match client {
        Some(client) => while !matches!(client.read(&mut [0; 16]).await, Ok(0) | Err(_)) {},
        None => std::future::pending().await,
    }
}

/// Writes all of `chunk` to the client, which may take its time: truncated output would
/// look complete to it. False when nobody has come to take it.
async fn deliver<C>(
    mut chunk: &[u8],
    client: &mut Option<C>,
    clients: &mut mpsc::Receiver<OutputClient<C>>,
    exited: &Exited,
) -> bool
where
    C: AsyncWrite + Unpin,
{
    let since = Instant::now();
    while !chunk.is_empty() {
        let unclaimed = client.is_none();
        let write = async {
            match client.as_mut() {
                Some(client) => client.write(chunk).await,
                None => std::future::pending().await,
            }
        };
        select! {
            biased;
            newer = clients.recv() => match newer {
                Some(newer) => *client = Some(newer.connection),
                None => return false,
            },
            written = write => match written {
                Ok(count) if count > 0 => chunk = chunk.get(count..).unwrap_or_default(),
                _ => {
                    *client = None;
                    return true;
                }
            },
            () = after_exit(exited.clone(), since, UNCLAIMED), if unclaimed => {
                tracing::warn!("dropped the last output of a command, which no client has taken");
                return false;
            }
        }
    }
    true
}
