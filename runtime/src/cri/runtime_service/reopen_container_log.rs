//! ReopenContainerLog: after rotation, the log goes on in a new file.

use std::sync::Arc;

use husk_proto::cri::{ReopenContainerLogRequest, ReopenContainerLogResponse};

use crate::container::State;
use crate::cri::error::Error;
use crate::node::Node;

pub(super) async fn reopen_container_log(
    node: &Arc<Node>,
    request: ReopenContainerLogRequest,
) -> Result<ReopenContainerLogResponse, Error> {
    let (_, container) = node.registry.container(&request.container_id)?;
    let state = container.state();
    if state != State::Running {
        return Err(Error::FailedPrecondition(format!(
            "reopen log: container `{}` is {}",
            container.id,
            state.word()
        )));
    }
    if let Some(log) = container.log() {
        let path = container.record().log_path.clone();
        log.reopen().map_err(|cause| Error::File { stage: "reopen container log", path, cause })?;
    }
    Ok(ReopenContainerLogResponse {})
}
