//! StopPodSandbox: gives back everything of a pod but its records. One that is
//! not known has nothing to give back.

use std::sync::Arc;

use husk_proto::cri::{StopPodSandboxRequest, StopPodSandboxResponse};

use crate::cri::error::Error;
use crate::node::Node;
use crate::sandbox::lifecycle;
use crate::sandbox::registry::LookupError;

pub(super) async fn stop_pod_sandbox(
    node: &Arc<Node>,
    request: StopPodSandboxRequest,
) -> Result<StopPodSandboxResponse, Error> {
    let sandbox = match node.registry.sandbox(&request.pod_sandbox_id) {
        Err(LookupError::Unknown { .. }) => return Ok(StopPodSandboxResponse {}),
        found => found?,
    };
    let _verb = sandbox.verb.lock().await;
    lifecycle::stop(node, &sandbox).await?;
    tracing::info!(sandbox = %sandbox.id, "pod stopped");
    Ok(StopPodSandboxResponse {})
}
