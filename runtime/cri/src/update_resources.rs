//! UpdateContainerResources, UpdatePodSandboxResources: new limits for what runs.
//!
//! A request changes what it names; a number that is 0 and a text that is empty
//! stay as they were (CRI `api.proto`).

use std::sync::Arc;

use husk_pods::{Error, Node, ops};
use husk_proto::cri::{
    UpdateContainerResourcesRequest, UpdateContainerResourcesResponse, UpdatePodSandboxResourcesRequest,
    UpdatePodSandboxResourcesResponse,
};

pub(crate) async fn of_container(
    node: &Arc<Node>,
    request: UpdateContainerResourcesRequest,
) -> Result<UpdateContainerResourcesResponse, Error> {
    // Whatever is wrong with the resources, a container that is not known comes first.
    node.registry.container(&request.container_id)?;
    if request.windows.is_some() {
        return Err(Error::Invalid("update resources: `windows`: this runtime has Linux containers".into()));
    }
    let asked = request.linux.ok_or_else(|| {
        Error::Invalid("update resources: the request has no resources of a Linux container".into())
    })?;
    ops::update_container(node, &request.container_id, asked).await?;
    Ok(UpdateContainerResourcesResponse {})
}

pub(crate) async fn of_sandbox(
    node: &Arc<Node>,
    request: UpdatePodSandboxResourcesRequest,
) -> Result<UpdatePodSandboxResourcesResponse, Error> {
    ops::update_sandbox(node, &request.pod_sandbox_id, request.overhead, request.resources).await?;
    Ok(UpdatePodSandboxResourcesResponse {})
}
