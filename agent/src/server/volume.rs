//! Volumes that are copied into the pod.

use std::sync::Arc;

use husk_proto::agent::{WriteVolumeRequest, WriteVolumeResponse};

use super::{Agent, Error, Stage, sandbox};
use crate::{id, live};

/// `WriteVolume`.
pub async fn write(agent: Arc<Agent>, request: WriteVolumeRequest) -> Result<WriteVolumeResponse, Error> {
    id::check("name", &request.name)?;
    sandbox::check_created(&agent)?;
    let _one_at_a_time = agent.live.lock().await;
    match live::write(&request.name, &request.entries) {
        Err(live::Error::Invalid(problem)) => Err(Error::Invalid(format!("entries: {problem}"))),
        written => written.stage("write the volume").map(|()| WriteVolumeResponse {}),
    }
}
