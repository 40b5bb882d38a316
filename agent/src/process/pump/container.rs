//! The output of a container, whose clients come and go.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::select;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::retained::Retained;
use super::{CHUNK, CLIENT_TIMEOUT, LATE_BYTES, LINGER, OutputClient, after_exit, ended_for};
use crate::process::fd::AsyncFile;
use crate::process::reaper::Exited;

/// The client that a stream has at present.
struct Client<C> {
    reader: ReadHalf<C>,
    writer: WriteHalf<C>,
    /// Bytes to be sent before the stream's: the number of its first.
    heading: Vec<u8>,
    /// The confirmation that is being read; `None` for a client that sends none.
    confirmation: Option<Vec<u8>>,
    /// The client was told that there is no more.
    finished: bool,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Client<C> {
    /// Takes the place of the client before.
    fn new(newer: OutputClient<C>, retained: &mut Retained) -> Self {
        let start = retained.begin(newer.from.unwrap_or(0));
        let (reader, writer) = split(newer.connection);
        let (heading, confirmation) = match newer.from {
            Some(_) => (start.to_be_bytes().to_vec(), Some(Vec::new())),
            None => (Vec::new(), None),
        };
        Self { reader, writer, heading, confirmation, finished: false }
    }

    fn has_work(&self, retained: &Retained) -> bool {
        !self.heading.is_empty() || !retained.all_sent()
    }
}

/// Reads from a client until it confirms something, and answers with the number. A future
/// that is dropped has lost nothing.
async fn confirmed<C: AsyncRead + AsyncWrite>(
    reader: &mut ReadHalf<C>,
    received: &mut Vec<u8>,
) -> io::Result<u64> {
    loop {
        if let Ok(number) = <[u8; 8]>::try_from(received.as_slice()) {
            received.clear();
            return Ok(u64::from_be_bytes(number));
        }
        let room = 8_u64.saturating_sub(received.len() as u64);
        if (&mut *reader).take(room).read_buf(received).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// An occurrence that a pump waits for.
enum Event<C> {
    Client(Option<OutputClient<C>>),
    Confirmed(io::Result<u64>),
    Written(io::Result<usize>),
    Read(io::Result<Vec<u8>>),
    /// Nobody is waited for who holds the stream open.
    Left,
    /// No client takes the last output.
    Untaken,
}

/// Sends the bytes of `source` to the newest of `clients`, until the source has ended and
/// all of it was taken. `kept` becomes true when the container has ended and nobody takes
/// its last output.
pub(super) async fn output<C>(
    source: AsyncFile,
    mut clients: mpsc::Receiver<OutputClient<C>>,
    exited: Exited,
    kept: watch::Sender<bool>,
) where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let opened = Instant::now();
    let mut progress = opened;
    let mut retained = Retained::default();
    let mut client = None;
    let mut is_open = true;
    let mut late = LATE_BYTES;
    loop {
        if !is_open {
            finish(&mut client, &retained).await;
            if retained.is_empty() && client.as_ref().is_none_or(|client: &Client<C>| client.finished) {
                return;
            }
        }
        // A stream that is full is not waited for as one that is silent.
        let may_read = is_open && retained.has_room();
        let may_keep = !retained.is_empty() && !*kept.borrow();
        let late_event = async {
            select! {
                () = after_exit(exited.clone(), opened, LINGER), if may_read => Event::Left,
                () = after_exit(exited.clone(), progress, CLIENT_TIMEOUT), if may_keep => Event::Untaken,
                else => std::future::pending().await,
            }
        };
        let chunk = async { if may_read { source.read(CHUNK).await } else { std::future::pending().await } };
        let event = next(&mut clients, &mut client, &retained, chunk, late_event).await;
        match event {
            Event::Client(Some(newer)) => client = Some(Client::new(newer, &mut retained)),
            // The container is removed.
            Event::Client(None) => return,
            Event::Confirmed(Ok(offset)) => {
                if retained.confirm(offset) {
                    progress = Instant::now();
                }
            }
            Event::Written(Ok(count)) if count > 0 => {
                progress = Instant::now();
                sent(client.as_mut(), &mut retained, count);
            }
            // The client is gone; another may come for the rest.
            Event::Confirmed(Err(_)) | Event::Written(_) => client = None,
            Event::Read(Ok(chunk)) if chunk.is_empty() => is_open = false,
            Event::Read(Ok(chunk)) => {
                if retained.is_empty() {
                    progress = Instant::now();
                }
                retained.push(&chunk);
                if ended_for(&exited) > Some(LINGER) {
                    late = late.saturating_sub(chunk.len());
                    is_open = late > 0;
                }
            }
            Event::Read(Err(error)) => {
                tracing::warn!(%error, "failed to read a process's output");
                is_open = false;
            }
            Event::Left => is_open = false,
            Event::Untaken => {
                tracing::info!("kept the last output of a container, which no client has taken");
                kept.send_replace(true);
            }
        }
    }
}

/// Waits for the next event: of a client, a `chunk` of the process, or that it is late.
async fn next<C>(
    clients: &mut mpsc::Receiver<OutputClient<C>>,
    client: &mut Option<Client<C>>,
    retained: &Retained,
    chunk: impl Future<Output = io::Result<Vec<u8>>>,
    late: impl Future<Output = Event<C>>,
) -> Event<C>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let has_work = client.as_ref().is_some_and(|client| client.has_work(retained));
    let (confirm, write) = match client {
        Some(Client { reader, writer, heading, confirmation, .. }) => {
            let bytes = if heading.is_empty() { retained.unsent() } else { heading };
            (confirmation.as_mut().map(|received| (reader, received)), Some((writer, bytes)))
        }
        None => (None, None),
    };
    let confirm = async {
        match confirm {
            Some((reader, received)) => confirmed(reader, received).await,
            None => std::future::pending().await,
        }
    };
    let write = async {
        match write {
            Some((writer, bytes)) => writer.write(bytes).await,
            None => std::future::pending().await,
        }
    };
    select! {
        biased;
        newer = clients.recv() => Event::Client(newer),
        offset = confirm => Event::Confirmed(offset),
        written = write, if has_work => Event::Written(written),
        chunk = chunk => Event::Read(chunk),
        event = late => event,
    }
}

/// A client was sent `count` bytes more.
fn sent<C>(client: Option<&mut Client<C>>, retained: &mut Retained, count: usize) {
    let Some(client) = client else { return };
    if !client.heading.is_empty() {
        client.heading.drain(..count.min(client.heading.len()));
        return;
    }
    retained.advance(count);
    if client.confirmation.is_none() {
        retained.confirm_sent();
    }
}

/// Tells a client that was sent everything that there is no more.
async fn finish<C>(client: &mut Option<Client<C>>, retained: &Retained)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    if let Some(present) = client
        && !present.finished
        && !present.has_work(retained)
    {
        // A client that has gone cannot be told.
        let _ = present.writer.shutdown().await;
        present.finished = true;
    }
}
