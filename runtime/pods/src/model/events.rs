//! Events: what happens to pods and containers, for whoever listens.
//!
//! An event carries records, as they were when it happened; how a client's
//! interface shows them is decided where the client is served.
//!
//! Nothing waits for a listener. One that falls too far behind is told how many
//! events it missed, and its stream ends, so that it looks at everything anew.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use futures::stream::unfold;
use tokio::sync::{broadcast, watch};

use super::container_record::ContainerRecord;
use super::sandbox_record::SandboxRecord;

/// Most events that a listener may be behind.
const MAX_BEHIND: usize = 256;

/// A change of a pod or a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The pod or container was made.
    Created,
    /// The pod or container was started.
    Started,
    /// The pod or container has ended.
    Stopped,
    /// The pod or container was removed.
    Deleted,
}

/// A change, and the pod as it was after it.
#[derive(Clone, Debug)]
pub struct Event {
    /// The id of the container, or of the pod if it happened to the pod itself.
    pub id: String,
    /// The kind of the change.
    pub kind: EventKind,
    /// The time of the change, nanoseconds since 1970.
    pub at: i64,
    /// The pod after it.
    pub sandbox: Arc<SandboxRecord>,
    /// The pod's containers that clients know, after it.
    pub containers: Vec<Arc<ContainerRecord>>,
}

/// A listener did not read in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("events: {lost} were lost because they were not read in time; list and listen again")]
pub struct Lagged {
    /// How many events it missed.
    pub lost: u64,
}

/// Where events are sent. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events(Arc<Channel>);

#[derive(Debug)]
struct Channel {
    events: broadcast::Sender<Arc<Event>>,
    closed: watch::Sender<bool>,
}

/// A listener's stream.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<Arc<Event>, Lagged>> + Send>>;

impl Default for Events {
    fn default() -> Self {
        Self(Arc::new(Channel {
            events: broadcast::Sender::new(MAX_BEHIND),
            closed: watch::Sender::new(false),
        }))
    }
}

impl Events {
    /// Sends the event that `make` answers, if anybody listens.
    pub fn send(&self, make: impl FnOnce() -> Event) {
        if self.0.events.receiver_count() > 0 {
            // Fails when nobody listens any more.
            let _ = self.0.events.send(Arc::new(make()));
        }
    }

    /// Listens to everything from now on.
    #[must_use]
    pub fn listen(&self) -> EventStream {
        let listener = (self.0.events.subscribe(), self.0.closed.subscribe(), false);
        Box::pin(unfold(listener, |(mut events, mut closed, behind)| async move {
            if behind {
                return None;
            }
            let event = tokio::select! {
                event = events.recv() => event,
                _ = closed.wait_for(|closed| *closed) => return None,
            };
            match event {
                Ok(event) => Some((Ok(event), (events, closed, false))),
                Err(broadcast::error::RecvError::Closed) => None,
                Err(broadcast::error::RecvError::Lagged(lost)) => {
                    Some((Err(Lagged { lost }), (events, closed, true)))
                }
            }
        }))
    }

    /// Ends every listener's stream: huskd is about to stop, which would
    /// otherwise wait for them.
    pub fn close(&self) {
        self.0.closed.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;
    use crate::test_util::sandbox_record;

    fn send(events: &Events, id: &str) {
        events.send(|| Event {
            id: id.into(),
            kind: EventKind::Created,
            at: 1,
            sandbox: sandbox_record(id).into(),
            containers: Vec::new(),
        });
    }

    #[tokio::test]
    async fn every_listener_hears_everything_from_its_start() {
        let events = Events::default();
        send(&events, "before");
        let (mut one, mut two) = (events.listen(), events.listen());
        send(&events, "a");
        send(&events, "b");
        for listener in [&mut one, &mut two] {
            assert_eq!(listener.next().await.unwrap().unwrap().id, "a");
            assert_eq!(listener.next().await.unwrap().unwrap().id, "b");
        }
        events.close();
        assert!(one.next().await.is_none());
    }

    #[tokio::test]
    async fn who_does_not_read_is_told_what_was_lost_and_ends() {
        let events = Events::default();
        let mut slow = events.listen();
        for number in 0..=MAX_BEHIND {
            send(&events, &number.to_string());
        }
        assert_eq!(slow.next().await.unwrap().unwrap_err(), Lagged { lost: 1 });
        assert!(slow.next().await.is_none());
    }
}
