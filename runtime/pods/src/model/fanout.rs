//! A container's output, for those who are attached to it.
//!
//! Whoever attaches gets what is said from then on. A client that takes it
//! slowly slows the container down, as a terminal does: nothing is lost, and no
//! more than [`QUEUE_UNITS`] waits for it. One that has taken nothing for [`SEND_TIMEOUT`]
//! is dropped, so that a client which was forgotten, or stopped with Ctrl-S,
//! cannot stop the container and its log for good.
//!
//! Once the container has ended nobody is waited for: what is still on its way
//! is little, and waits for a slow client in [`DRAIN_UNITS`] more. One that would
//! need more than that is dropped.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use husk_base::lock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

/// Most output that waits for one client, in units of [`UNIT`].
const QUEUE_UNITS: u32 = 256;

/// Most output that may wait besides at the end of the container: several times what
/// pipes and sockets hold between a container and its log.
const DRAIN_UNITS: u32 = 1024;

/// The smallest piece counts as this many bytes.
const UNIT: usize = 1024;

/// How long a client may hold the container up.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Both outputs of a container.
#[derive(Debug, Default)]
pub struct Output {
    /// Standard output; with a terminal, everything.
    pub stdout: Fanout,
    /// Standard error; nothing with a terminal.
    pub stderr: Fanout,
}

impl Output {
    /// The container has ended: nobody is waited for any more.
    pub fn hurry(&self) {
        self.stdout.hurry();
        self.stderr.hurry();
    }

    /// Ends the output for every client: there is no more.
    pub fn end(&self) {
        self.stdout.end();
        self.stderr.end();
    }
}

/// One output of a container.
#[derive(Debug, Default)]
pub struct Fanout(Mutex<Subscribers>);

#[derive(Debug, Default)]
struct Subscribers {
    hurried: bool,
    ended: bool,
    clients: Vec<Subscriber>,
}

/// A piece, and the room that it takes.
type Piece = (Bytes, OwnedSemaphorePermit);

#[derive(Clone, Debug)]
struct Subscriber {
    /// Bounded by `room`.
    queue: mpsc::UnboundedSender<Piece>,
    room: Arc<Semaphore>,
    dropped: Arc<AtomicBool>,
}

impl Subscriber {
    /// Puts `bytes` into the queue once there is room for them.
    async fn send(&self, bytes: Bytes, hurried: bool) -> Result<(), Lost> {
        let units = u32::try_from(bytes.len().div_ceil(UNIT)).unwrap_or(QUEUE_UNITS).clamp(1, QUEUE_UNITS);
        let room = self.room.clone();
        let place = if hurried {
            room.try_acquire_many_owned(units).map_err(|_| Lost::Late)?
        } else {
            let place = timeout(SEND_TIMEOUT, room.acquire_many_owned(units)).await;
            place.map_err(|_| Lost::Late)?.map_err(|_| Lost::Gone)?
        };
        self.queue.send((bytes, place)).map_err(|_| Lost::Gone)
    }
}

/// The reason for which a client gets no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    Late,
    Gone,
}

/// The output as one client gets it.
#[derive(Debug)]
pub struct Subscription {
    queue: mpsc::UnboundedReceiver<Piece>,
    dropped: Arc<AtomicBool>,
}

impl Subscription {
    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.queue.recv().await.map(|(bytes, _place)| bytes)
    }

    /// Whether the end was not the output's own: this client was too slow.
    #[must_use]
    pub fn was_dropped(&self) -> bool {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Fanout {
    /// Subscribes a client to all output from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        let (sender, queue) = mpsc::unbounded_channel();
        let dropped = Arc::new(AtomicBool::new(false));
        let mut subscribers = lock(&self.0);
        if !subscribers.ended {
            let room = if subscribers.hurried { QUEUE_UNITS + DRAIN_UNITS } else { QUEUE_UNITS };
            let room = Arc::new(Semaphore::new(room as usize));
            subscribers.clients.push(Subscriber { queue: sender, room, dropped: dropped.clone() });
        }
        Subscription { queue, dropped }
    }

    /// Hands `bytes`, at most 16 KiB, to every client, once each has room for
    /// them.
    pub async fn publish(&self, bytes: &[u8]) {
        let (clients, hurried) = {
            let subscribers = lock(&self.0);
            (subscribers.clients.clone(), subscribers.hurried)
        };
        if clients.is_empty() {
            return;
        }
        let bytes = Bytes::copy_from_slice(bytes);
        let sent = clients.iter().map(async |client| {
            if let Err(lost) = client.send(bytes.clone(), hurried).await {
                client.dropped.store(lost == Lost::Late, Ordering::Relaxed);
                lock(&self.0).clients.retain(|other| !other.queue.same_channel(&client.queue));
            }
        });
        join_all(sent).await;
    }

    /// Waits for no client from now on, and ends the waits that have begun.
    fn hurry(&self) {
        let mut subscribers = lock(&self.0);
        if !std::mem::replace(&mut subscribers.hurried, true) {
            for client in &subscribers.clients {
                client.room.add_permits(DRAIN_UNITS as usize);
            }
        }
    }

    /// Ends the output for every client: there is no more.
    pub fn end(&self) {
        let mut subscribers = lock(&self.0);
        subscribers.ended = true;
        subscribers.clients.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest piece.
    const PIECE: [u8; 16 * 1024] = [b'x'; 16 * 1024];

    /// The number of pieces that wait at most.
    const IN_ROOM: usize = QUEUE_UNITS as usize * UNIT / PIECE.len();

    /// Counts the pieces that are still to come.
    async fn rest(client: &mut Subscription) -> usize {
        let mut count = 0;
        while client.next().await.is_some() {
            count += 1;
        }
        count
    }

    #[tokio::test]
    async fn everybody_gets_everything_from_when_they_came() {
        let fanout = Fanout::default();
        fanout.publish(b"before").await;
        let mut first = fanout.subscribe();
        fanout.publish(b"one").await;
        let mut second = fanout.subscribe();
        fanout.publish(b"two").await;
        fanout.end();
        assert_eq!((first.next().await.unwrap(), first.next().await.unwrap()), ("one".into(), "two".into()));
        assert_eq!((first.next().await, second.next().await), (None, Some("two".into())));
        assert!(!first.was_dropped());
        assert_eq!(fanout.subscribe().next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_dropped_and_the_others_go_on() {
        let fanout = Fanout::default();
        let mut stuck = fanout.subscribe();
        let mut other = fanout.subscribe();
        let reader = tokio::spawn(async move {
            let mut count = 0;
            while other.next().await.is_some() {
                count += 1;
            }
            (count, other.was_dropped())
        });
        let started = tokio::time::Instant::now();
        for _ in 0..100 {
            fanout.publish(&PIECE).await;
        }
        assert!(started.elapsed() < SEND_TIMEOUT * 2, "{:?}", started.elapsed());
        fanout.end();
        assert_eq!(reader.await.unwrap(), (100, false));
        assert_eq!((rest(&mut stuck).await, stuck.was_dropped()), (IN_ROOM, true));
    }

    #[tokio::test(start_paused = true)]
    async fn the_smallest_pieces_are_bounded_too() {
        let fanout = Fanout::default();
        let mut stuck = fanout.subscribe();
        for _ in 0..1000 {
            fanout.publish(b"x").await;
        }
        assert_eq!((rest(&mut stuck).await, stuck.was_dropped()), (QUEUE_UNITS as usize, true));
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_end_nobody_is_waited_for_and_who_is_slow_gets_it_all_the_same() {
        let output = Arc::new(Output::default());
        let mut slow = output.stdout.subscribe();
        let said = IN_ROOM + 40;
        let publisher = tokio::spawn({
            let output = output.clone();
            async move {
                for _ in 0..said {
                    output.stdout.publish(&PIECE).await;
                }
                output.end();
            }
        });
        // The client takes so much that it is never late.
        let mut taken = 0;
        for _ in 0..4 {
            tokio::time::sleep(SEND_TIMEOUT - Duration::from_secs(1)).await;
            taken += usize::from(slow.next().await.is_some());
        }
        assert!(!publisher.is_finished());
        let hurried = tokio::time::Instant::now();
        output.hurry();
        publisher.await.unwrap();
        assert_eq!(hurried.elapsed(), Duration::ZERO);
        assert_eq!((taken + rest(&mut slow).await, slow.was_dropped()), (said, false));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_too_far_behind_at_the_end_does_not_take_it_for_the_end() {
        let output = Output::default();
        let mut early = output.stdout.subscribe();
        output.hurry();
        let mut late = output.stdout.subscribe();
        let started = tokio::time::Instant::now();
        for _ in 0..1000 {
            output.stdout.publish(&PIECE).await;
        }
        assert_eq!(started.elapsed(), Duration::ZERO);
        output.end();
        for client in [&mut early, &mut late] {
            let most = IN_ROOM + DRAIN_UNITS as usize * UNIT / PIECE.len();
            assert_eq!((rest(client).await, client.was_dropped()), (most, true));
        }
    }

    #[tokio::test]
    async fn a_client_that_goes_is_forgotten() {
        let fanout = Fanout::default();
        drop(fanout.subscribe());
        fanout.publish(b"x").await;
        assert!(lock(&fanout.0).clients.is_empty());
    }
}
