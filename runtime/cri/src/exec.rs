//! Exec: answers with the URL at which the client finds the command.

use std::sync::Arc;

use husk_pods::{Error, Node, ops};
use husk_proto::cri::{ExecRequest, ExecResponse};
use husk_streaming::StreamOptions;

pub(crate) fn exec(node: &Arc<Node>, request: ExecRequest) -> Result<ExecResponse, Error> {
    let wanted = StreamOptions {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.tty,
    };
    Ok(ExecResponse { url: ops::exec(node, &request.container_id, request.cmd, wanted)? })
}
