//! The RPC that copies synced volumes into the pod.

use std::sync::Arc;

use husk_proto::agent::{WriteVolumeRequest, WriteVolumeResponse};

use super::{Agent, Error, Stage, sandbox};
use crate::id;
use crate::pod::synced;

/// Serves `WriteVolume`.
pub async fn write(agent: Arc<Agent>, request: WriteVolumeRequest) -> Result<WriteVolumeResponse, Error> {
    id::check("name", &request.name)?;
    sandbox::check_created(&agent)?;
    let _one_at_a_time = agent.syncing.lock().await;
    // The agent has one thread, which serves the pod's streams meanwhile.
    let written = tokio::task::spawn_blocking(move || synced::write(&request.name, &request.entries)).await;
    match written.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
        Err(synced::Error::Invalid(problem)) => Err(Error::Invalid(format!("entries: {problem}"))),
        written => written.stage("write the volume").map(|()| WriteVolumeResponse {}),
    }
}
