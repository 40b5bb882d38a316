//! The input of a process.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::select;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{CHUNK, after_exit};
use crate::process::fd::AsyncFile;
use crate::process::reaper::Exited;

/// A connection for standard input.
pub struct Input<C> {
    /// The client's connection.
    pub connection: C,
    /// The bytes that came together with the connection's header.
    pub early: Vec<u8>,
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
