//! One connection: a task reads it, a task writes it, and its streams come to
//! whoever [`accept`](Connection::accept)s them.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::frame::{Control, Error, HEAD, Head};
use super::header::{Block, Deflater, Inflater};
use crate::peer::{CLOSE_DEADLINE, Peer, left_alone};
use crate::pipe::{Command, INCOMING, Incoming, OUTGOING, Outgoing, PIECE, PendingResets};
use husk_base::lock;

/// Most streams at a time: a port-forward has two for each connection.
pub const MAX_STREAMS: usize = 512;

/// Bytes that are put together for one write.
const BATCH: usize = 64 * 1024;

/// Bytes of a window that are given back at once.
const WINDOW_STEP: u32 = 32 * 1024;

/// A stream that the client has opened; the answer to it is on its way.
#[derive(Debug)]
pub struct Stream {
    /// The stream's number.
    pub id: u32,
    /// The client's headers, which say what the stream is for.
    pub headers: Block,
    /// Bytes from the client.
    pub incoming: Incoming,
    /// Bytes to the client.
    pub outgoing: Outgoing,
    /// The client has reset it, or gone.
    pub reset: CancellationToken,
}

/// The server's side of a SPDY connection. Dropped, it ends at once.
#[derive(Debug)]
pub struct Connection {
    streams: mpsc::Receiver<Stream>,
    commands: mpsc::Sender<Command>,
    gone: CancellationToken,
    reader: AbortOnDropHandle<()>,
    writer: AbortOnDropHandle<()>,
}

impl Connection {
    /// Starts the server's side of a session.
    pub fn start(io: impl AsyncRead + AsyncWrite + Send + 'static, peer: Peer) -> Self {
        let (reader, writer) = tokio::io::split(io);
        let (commands, queue) = mpsc::channel(OUTGOING);
        let (opened, streams) = mpsc::channel(1);
        let gone = CancellationToken::new();
        let table = Arc::<Table>::default();
        let mut reading = Reading {
            table: table.clone(),
            peer,
            opened,
            commands: commands.clone(),
            pending: Arc::default(),
            gone: gone.clone(),
            inflater: Inflater::default(),
            deflater: Deflater::default(),
            highest: 0,
        };
        let (ended, pending) = (gone.clone(), reading.pending.clone());
        let reader = tokio::spawn(async move {
            let mut reader = tokio::io::BufReader::with_capacity(PIECE, reader);
            if let Err(error) = reading.frames(&mut reader).await {
                tracing::debug!(%error, "streaming client");
            }
            // The streams' queues close with the table's entries.
            lock(&reading.table.streams).clear();
            reading.gone.cancel();
        });
        let writer = tokio::spawn(async move {
            let written = tokio::select! {
                written = write(writer, queue, &table, &pending) => written,
                () = left_alone(&ended) => Err(io::ErrorKind::TimedOut.into()),
            };
            if let Err(error) = written {
                tracing::debug!(%error, "streaming client");
                ended.cancel();
            }
        });
        Self {
            streams,
            commands,
            gone,
            reader: AbortOnDropHandle::new(reader),
            writer: AbortOnDropHandle::new(writer),
        }
    }

    /// The next stream that the client opens; `None` when the client has gone.
    pub async fn accept(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }

    /// Cancelled when the client has gone.
    #[must_use]
    pub const fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Ends the session once the client has everything that was sent, or has
    /// gone.
    pub async fn close(self) {
        let Self { streams, commands, gone, reader, writer } = self;
        drop(streams);
        let _ = commands.send(Command::Close).await;
        let _ = writer.await;
        if !gone.is_cancelled() {
            let _ = timeout(CLOSE_DEADLINE, reader).await;
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    /// Streams that are open in at least one direction.
    streams: Mutex<HashMap<u32, Entry>>,
    /// Bytes of the session's window that have not been given back.
    window: Mutex<u32>,
}

#[derive(Debug)]
struct Entry {
    /// The queue to the session; `None` once the client has sent its last byte.
    incoming: Option<mpsc::Sender<Bytes>>,
    /// Whether our last byte was sent.
    finished: bool,
    reset: CancellationToken,
    /// Bytes of the stream's window that have not been given back.
    window: u32,
}

impl Table {
    fn client_finished(&self, stream: u32) {
        let mut entries = lock(&self.streams);
        if let Some(entry) = entries.get_mut(&stream) {
            entry.incoming = None;
            if entry.finished {
                entries.remove(&stream);
            }
        }
    }

    fn we_finished(&self, stream: u32) {
        let mut entries = lock(&self.streams);
        if let Some(entry) = entries.get_mut(&stream) {
            entry.finished = true;
            if entry.incoming.is_none() {
                entries.remove(&stream);
            }
        }
    }

    fn reset(&self, stream: u32) {
        if let Some(entry) = lock(&self.streams).remove(&stream) {
            entry.reset.cancel();
        }
    }

    /// Counts bytes that have found room in a buffer; true if enough have for
    /// the client to be told.
    fn give_back(&self, stream: u32, bytes: u32) -> bool {
        let mut session = lock(&self.window);
        *session = session.saturating_add(bytes);
        let mut streams = lock(&self.streams);
        let stream = streams.get_mut(&stream).map_or(0, |entry| {
            entry.window = entry.window.saturating_add(bytes);
            entry.window
        });
        stream.max(*session) >= WINDOW_STEP
    }

    /// The windows in which the client may send more, and how much; 0 is the session's.
    fn take_windows(&self) -> Vec<(u32, u32)> {
        let mut session = lock(&self.window);
        let mut streams = lock(&self.streams);
        let streams = streams.iter_mut().map(|(stream, entry)| (*stream, &mut entry.window));
        let windows = std::iter::once((0, &mut *session)).chain(streams);
        let due = windows.filter(|(_, window)| **window >= WINDOW_STEP);
        due.map(|(stream, window)| (stream, std::mem::take(window) & 0x7fff_ffff)).collect()
    }
}

struct Reading {
    table: Arc<Table>,
    peer: Peer,
    opened: mpsc::Sender<Stream>,
    commands: mpsc::Sender<Command>,
    pending: Arc<PendingResets>,
    gone: CancellationToken,
    inflater: Inflater,
    deflater: Deflater,
    /// Highest stream that the client has opened.
    highest: u32,
}

impl Reading {
    /// Reads frames to the end of the connection.
    async fn frames(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        loop {
            let mut head = [0; HEAD];
            match reader.read_exact(&mut head).await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            };
            let goes_on = match Head::parse(head).map_err(io::Error::other)? {
                Head::Data { stream, fin, length } => self.data(reader, stream, fin, length).await?,
                Head::Control { kind, flags, length } => {
                    let mut payload = vec![0; usize::try_from(length).unwrap_or_default()];
                    reader.read_exact(&mut payload).await?;
                    let control = Control::parse(kind, flags, &payload, &mut self.inflater);
                    drop(payload);
                    self.control(control.map_err(io::Error::other)?).await.map_err(io::Error::other)?
                }
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// Passes a data frame on, piece by piece; false if the client goes
    /// meanwhile. Bytes for a stream that has ended are dropped.
    async fn data(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        stream: u32,
        fin: bool,
        length: u32,
    ) -> io::Result<bool> {
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        while left > 0 {
            let mut piece = BytesMut::with_capacity(left.min(PIECE));
            let read = reader.take(left.min(PIECE) as u64).read_buf(&mut piece).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left = left.saturating_sub(read);
            let queue = lock(&self.table.streams).get(&stream).and_then(|entry| entry.incoming.clone());
            if let Some(queue) = queue
                && !self.peer.enqueue(&queue, piece.freeze()).await
            {
                return Ok(false);
            }
            if self.table.give_back(stream, u32::try_from(read).unwrap_or(u32::MAX)) {
                self.pending.notify();
            }
        }
        if fin {
            self.table.client_finished(stream);
        }
        Ok(true)
    }

    async fn send(&mut self, control: Control) -> Result<bool, Error> {
        let mut frame = BytesMut::new();
        control.write(&mut self.deflater, &mut frame)?;
        Ok(self.commands.send(Command::Control(frame.freeze())).await.is_ok())
    }

    /// Acts on a control frame; false if the session has ended.
    async fn control(&mut self, control: Control) -> Result<bool, Error> {
        match control {
            Control::SynStream { stream, fin, headers } => {
                if stream <= self.highest {
                    return Err(Error::StreamId(stream));
                }
                self.highest = stream;
                self.open(stream, fin, headers).await
            }
            Control::RstStream { stream, .. } => {
                self.table.reset(stream);
                Ok(true)
            }
            Control::Headers { stream, fin: true, .. } => {
                self.table.client_finished(stream);
                Ok(true)
            }
            // Even numbers would be answers to pings of ours.
            Control::Ping { id } if !id.is_multiple_of(2) => {
                let _ = self.send(Control::Ping { id }).await?;
                Ok(true)
            }
            // The client closes what is open, and then the connection.
            _ => Ok(true),
        }
    }

    async fn open(&mut self, stream: u32, fin: bool, headers: Block) -> Result<bool, Error> {
        if lock(&self.table.streams).len() >= MAX_STREAMS {
            return self.send(Control::RstStream { stream, status: Control::REFUSED_STREAM }).await;
        }
        // The client drops data that comes before this.
        if !self.send(Control::SynReply { stream, fin: false, headers: Block::default() }).await? {
            return Ok(true);
        }
        let (queue, incoming) = mpsc::channel(INCOMING);
        let reset = self.gone.child_token();
        let entry =
            Entry { incoming: (!fin).then_some(queue), finished: false, reset: reset.clone(), window: 0 };
        lock(&self.table.streams).insert(stream, entry);
        let outgoing = Outgoing::new(stream, self.commands.clone(), self.pending.clone());
        // The session may accept no more streams.
        let _ = self.opened.send(Stream { id: stream, headers, incoming, outgoing, reset }).await;
        Ok(true)
    }
}

/// Obeys commands until the one to close.
async fn write(
    mut writer: impl AsyncWrite + Unpin,
    mut commands: mpsc::Receiver<Command>,
    table: &Table,
    pending: &PendingResets,
) -> io::Result<()> {
    let mut out = BytesMut::with_capacity(BATCH);
    loop {
        let mut close = false;
        tokio::select! {
            biased;
            () = pending.notified() => write_pending(table, pending, &mut out)?,
            command = commands.recv() => {
                let Some(mut command) = command else { return Ok(()) };
                loop {
                    close = matches!(command, Command::Close);
                    write_command(command, table, &mut out)?;
                    if close || out.len() >= BATCH {
                        break;
                    }
                    match commands.try_recv() {
                        Ok(next) => command = next,
                        Err(_) => break,
                    }
                }
            }
        }
        writer.write_all(&out).await?;
        writer.flush().await?;
        out.clear();
        if close {
            return writer.shutdown().await;
        }
    }
}

fn write_command(command: Command, table: &Table, out: &mut BytesMut) -> io::Result<()> {
    match command {
        Command::Data(stream, bytes) => {
            let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
            Head::Data { stream, fin: false, length }.write(out);
            out.extend_from_slice(&bytes);
        }
        Command::Finish(stream) => {
            Head::Data { stream, fin: true, length: 0 }.write(out);
            table.we_finished(stream);
        }
        Command::Reset(stream) => {
            write_control(&Control::RstStream { stream, status: Control::CANCEL }, out)?;
            table.reset(stream);
        }
        Command::Control(bytes) => out.extend_from_slice(&bytes),
        Command::Close => write_control(&Control::GoAway { last: 0, status: 0 }, out)?,
    }
    Ok(())
}

fn write_pending(table: &Table, pending: &PendingResets, out: &mut BytesMut) -> io::Result<()> {
    for stream in pending.take_resets() {
        write_command(Command::Reset(stream), table, out)?;
    }
    for (stream, delta) in table.take_windows() {
        write_control(&Control::WindowUpdate { stream, delta }, out)?;
    }
    Ok(())
}

/// Writes a frame that has no headers.
fn write_control(control: &Control, out: &mut BytesMut) -> io::Result<()> {
    control.write(&mut Deflater::default(), out).map_err(io::Error::other)
}
