//! RemovePodSandbox: stops a pod that still runs, and forgets it with all its
//! containers. One that is not known is removed already.

use std::sync::Arc;

use husk_proto::cri::{RemovePodSandboxRequest, RemovePodSandboxResponse};

use crate::cri::error::Error;
use crate::events::EventKind;
use crate::node::Node;
use crate::sandbox::lifecycle;
use crate::sandbox::registry::LookupError;

pub(super) async fn remove_pod_sandbox(
    node: &Arc<Node>,
    request: RemovePodSandboxRequest,
) -> Result<RemovePodSandboxResponse, Error> {
    let sandbox = match node.registry.sandbox(&request.pod_sandbox_id) {
        Err(LookupError::Unknown { .. }) => return Ok(RemovePodSandboxResponse {}),
        found => found?,
    };
    let _verb = sandbox.verb.lock().await;
    lifecycle::stop(node, &sandbox).await?;
    let containers = sandbox.containers();
    lifecycle::forget(node, &sandbox)?;
    let ids = containers.iter().map(|container| container.id.as_str());
    for id in ids.chain([sandbox.id.as_str()]) {
        sandbox.send_event(id, EventKind::Deleted);
    }
    tracing::info!(sandbox = %sandbox.id, "pod removed");
    Ok(RemovePodSandboxResponse {})
}
