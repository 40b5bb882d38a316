//! GetContainerEvents: events as the interface has them. A pod's own are those
//! of a container with the pod's id.

use futures::{Stream, StreamExt};
use husk_pods::Node;
use husk_pods::model::{Event, EventKind};
use husk_proto::cri::{ContainerEventResponse, ContainerEventType};
use tonic::Status;

use crate::runtime_service::Items;
use crate::{containers, sandboxes};

pub(crate) fn listen(node: &Node) -> Items<ContainerEventResponse> {
    Box::pin(to_cri(node.events.listen()))
}

fn to_cri<E: std::fmt::Display>(
    events: impl Stream<Item = Result<std::sync::Arc<Event>, E>>,
) -> impl Stream<Item = Result<ContainerEventResponse, Status>> {
    events.map(|event| match event {
        Ok(event) => Ok(response(&event)),
        Err(lagged) => Err(Status::data_loss(lagged.to_string())),
    })
}

fn response(event: &Event) -> ContainerEventResponse {
    ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind(event.kind).into(),
        created_at: event.at,
        pod_sandbox_status: Some(sandboxes::status_of(&event.sandbox)),
        containers_statuses: event.containers.iter().map(|record| containers::status_of(record)).collect(),
    }
}

const fn kind(kind: EventKind) -> ContainerEventType {
    match kind {
        EventKind::Created => ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => ContainerEventType::ContainerDeletedEvent,
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use husk_pods::model::Lagged;
    use husk_pods::test_util::{container_record, sandbox_record};

    use super::*;

    #[tokio::test]
    async fn an_event_has_the_statuses_of_its_records_and_a_loss_is_data_loss() {
        let event = Event {
            id: "c".into(),
            kind: EventKind::Stopped,
            at: 7,
            sandbox: sandbox_record("p").into(),
            containers: vec![container_record("c", "p").into()],
        };
        let events = stream::iter([Ok(event.into()), Err(Lagged { lost: 3 })]);
        let responses: Vec<_> = to_cri(events).collect().await;
        let first = responses[0].as_ref().unwrap();
        assert_eq!((first.container_id.as_str(), first.created_at), ("c", 7));
        assert_eq!(first.container_event_type(), ContainerEventType::ContainerStoppedEvent);
        assert_eq!(first.pod_sandbox_status.as_ref().unwrap().id, "p");
        assert_eq!(first.containers_statuses[0].id, "c");
        let lost = responses[1].as_ref().unwrap_err();
        assert_eq!(lost.code(), tonic::Code::DataLoss);
        assert!(lost.message().contains('3'));
    }
}
