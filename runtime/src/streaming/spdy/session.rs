//! One connection: a task reads it, a task writes it, and its streams come to
//! whoever [`accept`](Session::accept)s them.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::frame::{Control, Error, HEAD, Head};
use super::header::{Block, Deflater, Inflater};
use crate::sandbox::lock;
use crate::streaming::peer::Peer;
use crate::streaming::pipe::{Command, INCOMING, Incoming, OUTGOING, Outgoing, PIECE};

/// Most streams at a time: a port-forward has two for each connection.
pub const MAX_STREAMS: usize = 512;

/// How long a client may take to take the last bytes, and again to close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// Bytes that are put together for one write.
const BATCH: usize = 64 * 1024;

/// Bytes of a window that are given back at once.
const WINDOW_STEP: u32 = 32 * 1024;

/// A stream that the client has opened; the answer to it is on its way.
#[derive(Debug)]
pub struct Stream {
    /// Its number.
    pub id: u32,
    /// What it is for.
    pub headers: Block,
    /// What the client says on it.
    pub incoming: Incoming,
    /// What the client hears on it.
    pub outgoing: Outgoing,
    /// The client has reset it, or gone.
    pub reset: CancellationToken,
}

/// See the [module](self). Dropped, it ends at once.
#[derive(Debug)]
pub struct Session {
    streams: mpsc::Receiver<Stream>,
    commands: mpsc::Sender<Command>,
    gone: CancellationToken,
    reader: AbortOnDropHandle<()>,
    writer: AbortOnDropHandle<()>,
}

impl Session {
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
            gone: gone.clone(),
            inflater: Inflater::default(),
            deflater: Deflater::default(),
            highest: 0,
            window: 0,
        };
        let ended = gone.clone();
        let reader = tokio::spawn(async move {
            let mut reader = tokio::io::BufReader::with_capacity(PIECE, reader);
            if let Err(error) = reading.frames(&mut reader).await {
                tracing::debug!(%error, "streaming client");
            }
            // The streams' queues close with the table's entries.
            lock(&reading.table.0).clear();
            reading.gone.cancel();
        });
        let writer = tokio::spawn(async move {
            if let Err(error) = write(writer, queue, &table).await {
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

    /// Ends the session once the client has everything that was sent. What it
    /// still sends is read and dropped: a socket closed over unread bytes would
    /// take back what the client has not read yet.
    pub async fn close(self) {
        let Self { streams, commands, reader, writer, .. } = self;
        drop(streams);
        let flushed = async {
            let _ = commands.send(Command::Close).await;
            drop(commands);
            let _ = writer.await;
        };
        if timeout(CLOSE_DEADLINE, flushed).await.is_ok() {
            let _ = timeout(CLOSE_DEADLINE, reader).await;
        }
    }
}

/// The streams that are open in at least one direction.
#[derive(Debug, Default)]
struct Table(Mutex<HashMap<u32, Entry>>);

#[derive(Debug)]
struct Entry {
    /// `None` once the client has said its last byte.
    incoming: Option<mpsc::Sender<Bytes>>,
    /// Our last byte has been said.
    finished: bool,
    reset: CancellationToken,
    /// Bytes of its window that have not been given back.
    window: u32,
}

impl Table {
    fn client_finished(&self, stream: u32) {
        let mut entries = lock(&self.0);
        if let Some(entry) = entries.get_mut(&stream) {
            entry.incoming = None;
            if entry.finished {
                entries.remove(&stream);
            }
        }
    }

    fn we_finished(&self, stream: u32) {
        let mut entries = lock(&self.0);
        if let Some(entry) = entries.get_mut(&stream) {
            entry.finished = true;
            if entry.incoming.is_none() {
                entries.remove(&stream);
            }
        }
    }

    fn reset(&self, stream: u32) {
        if let Some(entry) = lock(&self.0).remove(&stream) {
            entry.reset.cancel();
        }
    }
}

struct Reading {
    table: Arc<Table>,
    peer: Peer,
    opened: mpsc::Sender<Stream>,
    commands: mpsc::Sender<Command>,
    gone: CancellationToken,
    inflater: Inflater,
    deflater: Deflater,
    /// Highest stream that the client has opened.
    highest: u32,
    /// Bytes of the session's window that have not been given back.
    window: u32,
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
            let queue = lock(&self.table.0).get(&stream).and_then(|entry| entry.incoming.clone());
            if let Some(queue) = queue
                && !self.peer.enqueue(&queue, piece.freeze()).await
            {
                return Ok(false);
            }
            self.give_back(stream, read);
        }
        if fin {
            self.table.client_finished(stream);
        }
        Ok(true)
    }

    /// Tells the client that bytes of its windows are free again, when it is
    /// worth a frame and there is room for one.
    fn give_back(&mut self, stream: u32, read: usize) {
        let read = u32::try_from(read).unwrap_or(u32::MAX);
        self.window = self.window.saturating_add(read);
        if self.window >= WINDOW_STEP && self.try_window_update(0, self.window) {
            self.window = 0;
        }
        let mut due = 0;
        if let Some(entry) = lock(&self.table.0).get_mut(&stream) {
            entry.window = entry.window.saturating_add(read);
            due = entry.window;
        }
        if due >= WINDOW_STEP
            && self.try_window_update(stream, due)
            && let Some(entry) = lock(&self.table.0).get_mut(&stream)
        {
            entry.window = 0;
        }
    }

    fn try_window_update(&mut self, stream: u32, delta: u32) -> bool {
        let mut frame = BytesMut::new();
        let update = Control::WindowUpdate { stream, delta: delta & 0x7fff_ffff };
        update.write(&mut self.deflater, &mut frame).is_ok()
            && self.commands.try_send(Command::Control(frame.freeze())).is_ok()
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
        if lock(&self.table.0).len() >= MAX_STREAMS {
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
        lock(&self.table.0).insert(stream, entry);
        let outgoing = Outgoing::new(stream, self.commands.clone());
        // Nobody may be interested in streams any more.
        let _ = self.opened.send(Stream { id: stream, headers, incoming, outgoing, reset }).await;
        Ok(true)
    }
}

/// Writes what it is told until it is told to close.
async fn write(
    mut writer: impl AsyncWrite + Unpin,
    mut commands: mpsc::Receiver<Command>,
    table: &Table,
) -> io::Result<()> {
    // These have no headers.
    let control = |control: Control, out: &mut BytesMut| {
        control.write(&mut Deflater::default(), out).map_err(io::Error::other)
    };
    let mut out = BytesMut::with_capacity(BATCH);
    while let Some(mut command) = commands.recv().await {
        let mut close = false;
        loop {
            match command {
                Command::Data(stream, bytes) => {
                    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
                    Head::Data { stream, fin: false, length }.write(&mut out);
                    out.extend_from_slice(&bytes);
                }
                Command::Finish(stream) => {
                    Head::Data { stream, fin: true, length: 0 }.write(&mut out);
                    table.we_finished(stream);
                }
                Command::Reset(stream) => {
                    control(Control::RstStream { stream, status: Control::CANCEL }, &mut out)?;
                    table.reset(stream);
                }
                Command::Control(bytes) => out.extend_from_slice(&bytes),
                Command::Close => {
                    control(Control::GoAway { last: 0, status: 0 }, &mut out)?;
                    close = true;
                }
            }
            if close || out.len() >= BATCH {
                break;
            }
            match commands.try_recv() {
                Ok(next) => command = next,
                Err(_) => break,
            }
        }
        writer.write_all(&out).await?;
        writer.flush().await?;
        out.clear();
        if close {
            return writer.shutdown().await;
        }
    }
    Ok(())
}
