//! Attach: answers with the URL at which the client finds the container.

use std::sync::Arc;

use husk_pods::{Error, Node, ops};
use husk_proto::cri::{AttachRequest, AttachResponse};
use husk_streaming::StreamOptions;

pub(crate) fn attach(node: &Arc<Node>, request: &AttachRequest) -> Result<AttachResponse, Error> {
    let wanted = StreamOptions {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.tty,
    };
    Ok(AttachResponse { url: ops::attach(node, &request.container_id, wanted)? })
}
