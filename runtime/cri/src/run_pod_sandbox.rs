//! RunPodSandbox: starts a pod, and answers with its id.

use std::sync::Arc;

use husk_pods::{Error, Node, ops};
use husk_proto::cri::{RunPodSandboxRequest, RunPodSandboxResponse};

pub(crate) async fn run_pod_sandbox(
    node: &Arc<Node>,
    request: RunPodSandboxRequest,
) -> Result<RunPodSandboxResponse, Error> {
    let config = request.config.ok_or_else(|| Error::Invalid("no sandbox configuration".into()))?;
    let id = ops::run_sandbox(node, config, &request.runtime_handler).await?;
    Ok(RunPodSandboxResponse { pod_sandbox_id: id.to_string() })
}
