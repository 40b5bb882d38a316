//! Connections to ports of a pod, made inside of it.

use std::sync::Arc;

use futures::FutureExt;
use husk_streaming::Session;

use super::ready::ready_pod;
use crate::{Error, Node};

/// Answers with the URL at which the client finds the pod's ports. Which of them,
/// it says for each connection.
///
/// # Errors
/// A pod that is not ready.
pub fn port_forward(node: &Arc<Node>, sandbox_id: &str) -> Result<String, Error> {
    let sandbox = node.registry.sandbox(sandbox_id)?;
    let running = ready_pod(&sandbox)?;
    let connect = move |port| {
        let running = running.clone();
        async move { running.agent.open_port(port).await }.boxed()
    };
    Ok(node.streaming.offer(Session::Ports(Arc::new(connect)))?)
}
