//! A client's streams as a session sees them, whatever carries them.
//!
//! Every transport has a task that reads its connection and one that writes it.
//! A stream's incoming bytes wait in a queue of [`INCOMING`] pieces; while that
//! is full, nothing more is read from the connection. Outgoing pieces of all
//! streams wait in one queue of [`OUTGOING`]; while that is full, their senders
//! wait. Resets of streams that were dropped cannot wait, because no task is
//! left for it: they are [`PendingResets`].

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use husk_base::lock;

/// The longest piece, bytes.
pub const PIECE: usize = 32 * 1024;

/// How many pieces of each stream wait for the session.
pub const INCOMING: usize = 4;

/// How many pieces of all streams wait for the connection.
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
    /// A frame of the transport's own.
    Control(Bytes),
    /// The session has ended; the client is told so.
    Close,
}

/// Streams whose reset is sent as soon as the connection takes
/// bytes, however full its queue is. There are never more than the connection
/// has streams, because each is reset once.
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

    /// Returns once the task that writes was woken, also if that was before the call.
    pub async fn notified(&self) {
        self.changed.notified().await;
    }

    /// The streams that are to be reset.
    #[must_use]
    pub fn take_resets(&self) -> Vec<u32> {
        std::mem::take(&mut lock(&self.resets))
    }
}

/// A stream to the client. It is reset when it is dropped unfinished.
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
    pub(crate) const fn new(id: u32, commands: mpsc::Sender<Command>, pending: Arc<PendingResets>) -> Self {
        Self { id, commands, pending, open: true }
    }

    /// Sends bytes, at most 32 KiB, once there is room for them.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn send(&self, bytes: Bytes) -> Result<(), Gone> {
        self.commands.send(Command::Data(self.id, bytes)).await.map_err(|_| Gone)
    }

    /// Ends the stream.
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
            // This reset overtakes the queued bytes; clients drop bytes of a stream
            // that was reset.
            self.pending.reset(self.id);
        }
    }
}
