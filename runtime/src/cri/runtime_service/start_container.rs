//! StartContainer.

use std::sync::Arc;

use husk_proto::agent;
use husk_proto::cri::{ContainerEventType, StartContainerRequest, StartContainerResponse};

use super::create_container::ready_machine;
use crate::container::{Container, Exit, State, now};
use crate::cri::error::Error;
use crate::node::Node;
use crate::vm::Machine;

/// Exit code of a container whose program never ran, as shells and other
/// runtimes have it.
const CANNOT_START: i32 = 128;

pub(super) async fn start_container(
    node: &Arc<Node>,
    request: StartContainerRequest,
) -> Result<StartContainerResponse, Error> {
    let (sandbox, container) = node.registry.container(&request.container_id)?;
    let _verb = container.verb.lock().await;
    let state = container.state();
    if state != State::Created {
        return Err(Error::FailedPrecondition(format!(
            "container `{}` is {}, and only a created one can be started",
            container.id,
            state.word()
        )));
    }
    let machine = ready_machine(&sandbox)?;
    let started_at = now();
    // It may run to its end before the agent's answer is here, so it counts as
    // running from now on.
    container.update(|record| {
        record.state = State::Running;
        record.started_at = started_at;
    })?;
    if let Err(error) = start(&machine, &container).await {
        let exit = Exit {
            code: CANNOT_START,
            finished_at: now(),
            reason: "StartError".into(),
            message: error.to_string(),
        };
        node.events.container_ended(&sandbox, &container, exit);
        return Err(error);
    }
    node.events.tell(&sandbox, container.id.as_str(), ContainerEventType::ContainerStartedEvent);
    tracing::info!(container = %container.id, "container started");
    Ok(StartContainerResponse {})
}

async fn start(machine: &Machine, container: &Container) -> Result<(), Error> {
    let known = container.record().start_error.clone();
    if !known.is_empty() {
        return Err(Error::FailedPrecondition(format!("start container: {known}")));
    }
    let request = agent::StartContainerRequest { container_id: container.id.to_string() };
    machine.agent.call("start container", async |mut agent| agent.start_container(request).await).await?;
    Ok(())
}
