//! RemoveContainer: kills what runs, and forgets the container. One that is not
//! known is removed already.

use std::sync::Arc;

use husk_proto::agent;
use husk_proto::cri::{RemoveContainerRequest, RemoveContainerResponse};

use crate::container::Container;
use crate::cri::error::Error;
use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::sandbox::registry::LookupError;

pub(super) async fn remove_container(
    node: &Arc<Node>,
    request: RemoveContainerRequest,
) -> Result<RemoveContainerResponse, Error> {
    let (sandbox, container) = match node.registry.container(&request.container_id) {
        Err(LookupError::Unknown { .. }) => return Ok(RemoveContainerResponse {}),
        found => found?,
    };
    let _verb = container.verb.lock().await;
    take_apart(node, &sandbox, &container).await?;
    tracing::info!(container = %container.id, "container removed");
    Ok(RemoveContainerResponse {})
}

/// Removes a container in whatever state it is, half-made ones included. Can be
/// repeated.
///
/// # Errors
/// With what could not be removed; the record stays then.
pub async fn take_apart(
    node: &Node,
    sandbox: &Arc<Sandbox>,
    container: &Arc<Container>,
) -> Result<(), Error> {
    if let Some(machine) = sandbox.machine() {
        let request = agent::RemoveContainerRequest { container_id: container.id.to_string() };
        machine
            .agent
            .call("remove container", async |mut agent| agent.remove_container(request).await)
            .await?;
        let slot = container.record().image_slot.clone();
        let mut slots = machine.slots.hold().await;
        if slots.release(&slot) {
            machine.control.detach_disk(slot).await?;
        }
    }
    container.forget()?;
    node.registry.remove_container(container);
    Ok(())
}
