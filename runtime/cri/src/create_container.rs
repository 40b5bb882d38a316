//! CreateContainer: makes a container, and answers with its id.

use std::sync::Arc;

use husk_pods::{Error, Node, ops};
use husk_proto::cri::{CreateContainerRequest, CreateContainerResponse};

pub(crate) async fn create_container(
    node: &Arc<Node>,
    request: CreateContainerRequest,
) -> Result<CreateContainerResponse, Error> {
    let config = request.config.ok_or_else(|| Error::Invalid("no container configuration".into()))?;
    if config.metadata.as_ref().is_none_or(|metadata| metadata.name.is_empty()) {
        return Err(Error::Invalid("container metadata needs a name".into()));
    }
    let id = ops::create_container(node, &request.pod_sandbox_id, config).await?;
    Ok(CreateContainerResponse { container_id: id.to_string() })
}
