//! ExecSync: runs a command in a container and answers with what it said.

use std::sync::Arc;
use std::time::Duration;

use husk_pods::{Error, Node, ops};
use husk_proto::cri::{ExecSyncRequest, ExecSyncResponse};

use crate::serve::MAX_MESSAGE;

/// Most bytes of output in an answer: what one message holds, less its frame.
const MAX_OUTPUT: usize = MAX_MESSAGE - 1024;

pub(crate) async fn exec_sync(node: &Arc<Node>, request: ExecSyncRequest) -> Result<ExecSyncResponse, Error> {
    let limit = u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0);
    let limit = limit.map(Duration::from_secs);
    let output = ops::exec_sync(node, &request.container_id, request.cmd, limit, MAX_OUTPUT).await?;
    Ok(response(output))
}

fn response(output: ops::Output) -> ExecSyncResponse {
    let ops::Output { stdout, stderr, exit_code } = output;
    ExecSyncResponse { stdout, stderr, exit_code }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn the_longest_answer_fits_into_a_message() {
        let stdout = vec![b'x'; MAX_OUTPUT * 3 / 4];
        let stderr = vec![b'x'; MAX_OUTPUT - stdout.len()];
        let answer = response(ops::Output { stdout, stderr, exit_code: i32::MIN });
        assert!(answer.encoded_len() <= MAX_MESSAGE, "{}", answer.encoded_len());
    }
}
