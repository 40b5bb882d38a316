//! PortForward: connections to ports of a pod, made inside its machine.

use std::sync::Arc;

use futures::FutureExt;
use husk_proto::cri::{PortForwardRequest, PortForwardResponse};

use super::create_container::ready_machine;
use crate::cri::error::Error;
use crate::node::Node;
use crate::streaming::Offer;

/// Answers with the URL at which the client finds the pod's ports. Which of
/// them, it says for each connection; `request.port` is for pods in which that
/// cannot be.
pub(super) fn port_forward(
    node: &Arc<Node>,
    request: &PortForwardRequest,
) -> Result<PortForwardResponse, Error> {
    let sandbox = node.registry.sandbox(&request.pod_sandbox_id)?;
    let machine = ready_machine(&sandbox)?;
    let connect = move |port| {
        let machine = machine.clone();
        async move { machine.agent.open_port(port).await }.boxed()
    };
    Ok(PortForwardResponse { url: node.streaming.offer(Offer::Ports(Arc::new(connect)))? })
}
