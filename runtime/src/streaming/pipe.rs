//! What a verb sees of a client's streams, whatever carries them.
//!
//! Every transport has a task that reads its connection and one that writes it.
//! A stream's incoming bytes wait in a queue of [`INCOMING`] pieces; while that
//! is full, nothing more is read from the connection. Outgoing pieces of all
//! streams wait in one queue of [`OUTGOING`]; while that is full, whoever has
//! more waits.

use bytes::Bytes;
use tokio::sync::mpsc;

/// Longest piece, bytes.
pub const PIECE: usize = 32 * 1024;

/// Pieces that wait for the verb, of each stream.
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

/// What the task that writes a connection is told.
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

/// A stream to the client. Reset when it is dropped unfinished.
#[derive(Debug)]
pub struct Outgoing {
    id: u32,
    commands: mpsc::Sender<Command>,
    open: bool,
}

impl Outgoing {
    /// The stream `id` of the connection that `commands` leads to.
    #[must_use]
    pub const fn new(id: u32, commands: mpsc::Sender<Command>) -> Self {
        Self { id, commands, open: true }
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
        if self.open {
            // With a full queue the connection is on its way out, and takes
            // its streams with it.
            let _ = self.commands.try_send(Command::Reset(self.id));
        }
    }
}
