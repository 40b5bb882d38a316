//! What happens to pods and containers, told to whoever listens
//! (`GetContainerEvents`). A pod tells of itself as a container with the pod's
//! own id.
//!
//! Nothing waits for a listener: one that falls too far behind is told so and
//! its stream ends, so that it looks at everything anew.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use futures::stream::unfold;
use husk_proto::cri::{ContainerEventResponse, ContainerEventType};
use tokio::sync::{broadcast, watch};
use tonic::Status;

use crate::container::{Container, Exit, State, now};
use crate::cri::runtime_service::{container_status_of, sandbox_status_of};
use crate::sandbox::Sandbox;

/// Most events that a listener may be behind.
const MAX_BEHIND: usize = 256;

/// Where events are told. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events(Arc<Channel>);

#[derive(Debug)]
struct Channel {
    events: broadcast::Sender<Arc<ContainerEventResponse>>,
    closed: watch::Sender<bool>,
}

/// A listener's stream.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<ContainerEventResponse, Status>> + Send>>;

impl Default for Events {
    fn default() -> Self {
        Self(Arc::new(Channel {
            events: broadcast::Sender::new(MAX_BEHIND),
            closed: watch::Sender::new(false),
        }))
    }
}

impl Events {
    /// Tells that something happened to the container `id` of a pod, or to the
    /// pod itself, with how the pod and its containers are now.
    pub fn tell(&self, sandbox: &Sandbox, id: &str, what: ContainerEventType) {
        if self.0.events.receiver_count() == 0 {
            return;
        }
        let containers = sandbox.containers().into_iter().map(|container| container.record().clone());
        let event = ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: what.into(),
            created_at: now(),
            pod_sandbox_status: Some(sandbox_status_of(&sandbox.record())),
            containers_statuses: containers
                .filter(|record| record.state != State::Creating)
                .map(|record| container_status_of(&record))
                .collect(),
        };
        // Fails when nobody listens any more.
        let _ = self.0.events.send(Arc::new(event));
    }

    /// Records a container's end, and tells of it if it was the first to be
    /// told. Who waits for the container goes on after that.
    pub fn container_ended(&self, sandbox: &Sandbox, container: &Container, exit: Exit) {
        if container.record_exit(exit) {
            self.tell(sandbox, container.id.as_str(), ContainerEventType::ContainerStoppedEvent);
        }
        container.announce_exit();
    }

    /// Everything from now on.
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
                Ok(event) => Some((Ok(Arc::unwrap_or_clone(event)), (events, closed, false))),
                Err(broadcast::error::RecvError::Closed) => None,
                Err(broadcast::error::RecvError::Lagged(lost)) => {
                    let status = Status::data_loss(format!(
                        "events: {lost} were lost because they were not read in time; list and listen again"
                    ));
                    Some((Err(status), (events, closed, true)))
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
    #![allow(clippy::unwrap_used)]

    use futures::StreamExt;

    use super::*;

    fn send(events: &Events, id: &str) {
        let event = ContainerEventResponse { container_id: id.into(), ..Default::default() };
        let _ = events.0.events.send(Arc::new(event));
    }

    #[tokio::test]
    async fn every_listener_hears_everything_from_its_start() {
        let events = Events::default();
        send(&events, "before");
        let (mut one, mut two) = (events.listen(), events.listen());
        send(&events, "a");
        send(&events, "b");
        for listener in [&mut one, &mut two] {
            assert_eq!(listener.next().await.unwrap().unwrap().container_id, "a");
            assert_eq!(listener.next().await.unwrap().unwrap().container_id, "b");
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
        let error = slow.next().await.unwrap().unwrap_err();
        assert_eq!(error.code(), tonic::Code::DataLoss);
        assert!(slow.next().await.is_none());
    }
}
