//! Tells whether a client is still there.
//!
//! While it is, it may take as long as it likes to read what it was sent: a pager
//! that waits for a key is no error. Whether its machine is there the kernel
//! knows: it asks one that is silent, see `server.rs`, which takes two minutes,
//! and gives up on one that does not acknowledge what it was sent, which takes
//! about fifteen (`tcp_retries2`). A client that leaves while nobody can read its
//! connection, because what it has sent already is waiting to be taken, is
//! looked for. As long as more is on its way than the kernel has room for, its
//! end cannot arrive; the client's kernel then gives up after a while, which is
//! noticed too.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The pause between two looks.
const INTERVAL: Duration = Duration::from_secs(5);

/// The time that a client which sends nothing more has to take the rest.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// The time that a client has to close once the kernel has everything that it is
/// to get. Until then what it still sends is read and dropped: a socket closed
/// over unread bytes would take back what the client has not read yet. Long
/// enough to read slowly what the kernel's buffers hold.
pub const CLOSE_DEADLINE: Duration = Duration::from_secs(3600);

/// Returns when a client has gone and had time to take the rest.
pub async fn left_alone(gone: &CancellationToken) {
    gone.cancelled().await;
    tokio::time::sleep(DRAIN_DEADLINE).await;
}

/// A second descriptor of a client's socket.
#[derive(Debug)]
pub struct Peer(Option<OwnedFd>);

impl Peer {
    /// Watches this socket.
    pub fn of(socket: &impl AsFd) -> Self {
        // Without it a client that vanishes is noticed later.
        Self(socket.as_fd().try_clone_to_owned().ok())
    }

    /// Watches nothing.
    #[cfg(any(test, feature = "fuzzing"))]
    pub const fn none() -> Self {
        Self(None)
    }

    fn has_gone(&self) -> bool {
        let Some(socket) = &self.0 else { return false };
        // The peer has closed, whatever can still be read.
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
        poll(&mut polled, Some(&Timespec::default())).is_ok()
            && polled.iter().any(|fd| fd.revents().intersects(ended))
    }

    /// Puts `bytes` into `queue` once there is room; false if the client goes
    /// before. A queue that nobody takes from any more swallows them.
    pub async fn enqueue(&self, queue: &mpsc::Sender<Bytes>, bytes: Bytes) -> bool {
        loop {
            match tokio::time::timeout(INTERVAL, queue.reserve()).await {
                Ok(Ok(room)) => {
                    room.send(bytes);
                    return true;
                }
                Ok(Err(_closed)) => return true,
                Err(_full) if self.has_gone() => return false,
                Err(_full) => {}
            }
        }
    }
}
