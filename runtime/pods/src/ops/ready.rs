//! Pods and containers of which something can be asked now.

use std::sync::Arc;

use husk_backend::RunningPod;

use crate::Error;
use crate::model::{Container, Phase, Sandbox, State};

/// The pod of a sandbox that is ready for containers.
pub(crate) fn ready_pod(sandbox: &Sandbox) -> Result<Arc<RunningPod>, Error> {
    if sandbox.record().phase != Phase::Ready {
        return Err(Error::WrongState(format!("sandbox `{}` is not ready", sandbox.id)));
    }
    sandbox.running().ok_or_else(|| {
        Error::WrongState(format!(
            "sandbox `{}`: its agent has not answered since huskd started: try again, or stop the pod",
            sandbox.id
        ))
    })
}

/// The pod of a container that runs, or is about to; `rpc` is what is asked of it.
pub(crate) fn pod_of_unended(
    rpc: &str,
    sandbox: &Sandbox,
    container: &Container,
) -> Result<Arc<RunningPod>, Error> {
    match container.record().state {
        State::Created => ready_pod(sandbox),
        _ => pod_of_running(rpc, sandbox, container),
    }
}

/// The pod of a container that runs; `rpc` is what is asked of it.
pub(crate) fn pod_of_running(
    rpc: &str,
    sandbox: &Sandbox,
    container: &Container,
) -> Result<Arc<RunningPod>, Error> {
    let record = container.record();
    if record.state != State::Running {
        let (id, word) = (&container.id, record.state.word());
        return Err(Error::WrongState(format!("{rpc}: container `{id}` is {word}")));
    }
    ready_pod(sandbox)
}
