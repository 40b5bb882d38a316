//! RemovePodSandbox: stops a pod that still runs, and forgets it with all its
//! containers. One that is not known is removed already.

use std::sync::Arc;

use husk_proto::cri::{RemovePodSandboxRequest, RemovePodSandboxResponse};

use crate::cri::error::Error;
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
    lifecycle::forget(node, &sandbox)?;
    tracing::info!(sandbox = %sandbox.id, "pod removed");
    Ok(RemovePodSandboxResponse {})
}
