//! A container's output, for those who are attached to it.
//!
//! Whoever attaches gets what is said from then on. A client that takes it
//! slowly slows the container down, as a terminal does: nothing is lost, and no
//! more than [`BUFFER`] pieces wait for it. One that has taken nothing for
//! [`PATIENCE`] is dropped, so that a client which was forgotten, or stopped
//! with Ctrl-S, cannot stop the container and its log for good.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::sandbox::lock;

/// Pieces that wait for one client; of at most 16 KiB each.
const BUFFER: usize = 16;

/// How long a client may hold the container up.
/// Shorter than the time that a container's last bytes are given.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Both outputs of a container.
#[derive(Debug, Default)]
pub struct Output {
    /// With a terminal, everything.
    pub stdout: Fanout,
    /// The rest.
    pub stderr: Fanout,
}

/// One output.
#[derive(Debug, Default)]
pub struct Fanout(Mutex<Subscribers>);

#[derive(Debug, Default)]
struct Subscribers {
    ended: bool,
    clients: Vec<Subscriber>,
}

#[derive(Clone, Debug)]
struct Subscriber {
    queue: mpsc::Sender<Bytes>,
    dropped: Arc<AtomicBool>,
}

/// What one client gets.
#[derive(Debug)]
pub struct Subscription {
    queue: mpsc::Receiver<Bytes>,
    dropped: Arc<AtomicBool>,
}

impl Subscription {
    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.queue.recv().await
    }

    /// That was not the output's end: this client was too slow.
    #[must_use]
    pub fn was_dropped(&self) -> bool {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Fanout {
    /// What is said from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        let (sender, queue) = mpsc::channel(BUFFER);
        let dropped = Arc::new(AtomicBool::new(false));
        let mut subscribers = lock(&self.0);
        if !subscribers.ended {
            subscribers.clients.push(Subscriber { queue: sender, dropped: dropped.clone() });
        }
        Subscription { queue, dropped }
    }

    /// Hands `bytes` to every client, once each has room for them.
    pub async fn publish(&self, bytes: &[u8]) {
        let clients = lock(&self.0).clients.clone();
        if clients.is_empty() {
            return;
        }
        let bytes = Bytes::copy_from_slice(bytes);
        let sent = clients.iter().map(async |client| {
            let late = match timeout(PATIENCE, client.queue.send(bytes.clone())).await {
                Ok(Ok(())) => return,
                Ok(Err(_gone)) => false,
                Err(_late) => true,
            };
            client.dropped.store(late, Ordering::Relaxed);
            lock(&self.0).clients.retain(|other| !other.queue.same_channel(&client.queue));
        });
        join_all(sent).await;
    }

    /// There is no more to say.
    pub fn end(&self) {
        let mut subscribers = lock(&self.0);
        subscribers.ended = true;
        subscribers.clients.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

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
            fanout.publish(b"x").await;
        }
        assert!(started.elapsed() < PATIENCE * 2, "{:?}", started.elapsed());
        fanout.end();
        assert_eq!(reader.await.unwrap(), (100, false));
        let mut waiting = 0;
        while stuck.next().await.is_some() {
            waiting += 1;
        }
        assert_eq!((waiting, stuck.was_dropped()), (BUFFER, true));
    }

    #[tokio::test]
    async fn a_client_that_goes_is_forgotten() {
        let fanout = Fanout::default();
        drop(fanout.subscribe());
        fanout.publish(b"x").await;
        assert!(lock(&fanout.0).clients.is_empty());
    }
}
