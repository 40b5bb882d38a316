//! A client's streams as a session sees them, whatever carries them.
//!
//! Every transport has a task that reads its connection and one that writes it.
//! A stream's incoming bytes wait in a queue of [`INCOMING`] pieces; while that
//! is full, nothing more is read from the connection. Outgoing pieces of all
//! streams wait in one queue of [`OUTGOING`]; while that is full, whoever has
//! more waits. Resets of streams that were dropped cannot wait, because nobody is
//! left to do it: they are [`PendingResets`].

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use husk_base::lock;

/// Longest piece, bytes.
pub const PIECE: usize = 32 * 1024;

/// Pieces of each stream that wait for the session.
pub const INCOMING: usize = 4;

/// Pieces that wait for the connection, of all its streams.
pub const OUTGOING: usize = 8;

/// The client has gone, or does not want this stream any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client has gone")]
pub struct Gone;

/// Bytes from the client: ends when the client has closed its half, reset the
/// stream, or gone.
pub type Incoming = mpsc::Receiver<Bytes>;

/// Orders for the task that writes a connection.
#[derive(Debug)]
pub enum Command {
    /// Bytes of a stream.
    Data(u32, Bytes),
    /// A stream's last byte has been sent.
    Finish(u32),
    /// A stream ends in both directions.
    Reset(u32),
    /// Something of the transport's own.
    Control(Bytes),
    /// Everything has been said: tell the client so.
    Close,
}

/// Streams whose reset the client is to be told of as soon as the connection takes
/// something, however full its queue is. There are never more than the connection
/// has streams: each is reset once.
#[derive(Debug, Default)]
pub struct PendingResets {
    resets: Mutex<Vec<u32>>,
    changed: Notify,
}

impl PendingResets {
    fn reset(&self, stream: u32) {
        lock(&self.resets).push(stream);
        self.notify();
    }

    /// Wakes the task that writes.
    pub fn notify(&self) {
        self.changed.notify_one();
    }

    /// Returns once the task that writes was woken, also if it was so before.
    pub async fn notified(&self) {
        self.changed.notified().await;
    }

    /// The streams that are to be reset.
    #[must_use]
    pub fn take_resets(&self) -> Vec<u32> {
        std::mem::take(&mut lock(&self.resets))
    }
}

/// A stream to the client. Reset when it is dropped unfinished.
#[derive(Debug)]
pub struct Outgoing {
    id: u32,
    commands: mpsc::Sender<Command>,
    pending: Arc<PendingResets>,
    open: bool,
}

impl Outgoing {
    /// The stream `id` of the connection that `commands` leads to.
    #[must_use]
    pub const fn new(id: u32, commands: mpsc::Sender<Command>, pending: Arc<PendingResets>) -> Self {
        Self { id, commands, pending, open: true }
    }

    /// Sends bytes, at most [`PIECE`], once there is room for them.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn send(&self, bytes: Bytes) -> Result<(), Gone> {
        self.commands.send(Command::Data(self.id, bytes)).await.map_err(|_| Gone)
    }

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn finish(mut self) -> Result<(), Gone> {
        self.open = false;
        self.commands.send(Command::Finish(self.id)).await.map_err(|_| Gone)
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if self.open
            && let Err(mpsc::error::TrySendError::Full(_)) = self.commands.try_send(Command::Reset(self.id))
        {
            // It then overtakes what is queued; clients drop bytes of a stream
            // that was reset.
            self.pending.reset(self.id);
        }
    }
}
