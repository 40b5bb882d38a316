//! Copying of volumes that change under their containers into the VM, see
//! [`husk_volumes::synced`].

use std::sync::Arc;

use husk_agent_client as agent;
use husk_backend::RunningPod;
use husk_proto::agent::WriteVolumeRequest;
use husk_volumes::Volume;
use husk_volumes::synced::keep_up;

use crate::model::Container;

/// Copies a volume into the VM as it is now, unless it is there.
///
/// # Errors
/// The agent refuses it, or a file of the host does not read, as an internal error.
pub(crate) async fn send(running: &RunningPod, volume: &Volume) -> Result<(), agent::Error> {
    const STAGE: &str = "copy volume";
    let read = async {
        husk_volumes::synced::read(&volume.source).await.map_err(|unread| {
            let status = tonic::Status::internal(unread.to_string());
            agent::Error { stage: STAGE, status: Box::new(status), lost: false }
        })
    };
    let write = async |entries| {
        let request = WriteVolumeRequest { name: volume.name.clone(), entries };
        running.agent.call(STAGE, async |mut agent| agent.write_volume(request).await).await.map(drop)
    };
    volume.copied.bring(read, write).await
}

/// Follows the changes of a container's volumes, for as long as it may run.
pub(crate) fn follow(running: &Arc<RunningPod>, container: &Arc<Container>) {
    for volume in container.record().volumes.iter().filter(|volume| volume.synced) {
        let (running, volume, theirs) = (running.clone(), volume.clone(), container.clone());
        container.spawn_task(async move {
            tokio::select! {
                () = theirs.wait_exited() => {}
                () = keep_up(&volume.source.path, || send(&running, &volume)) => {}
            }
        });
    }
}
