//! Making a container: the image's disk and the volumes into the pod, the OCI
//! configuration, `runc create` by the agent, the log.

use std::mem;
use std::path::Path;
use std::sync::Arc;

use husk_backend::{Claim, FileServer, RunningPod};
use husk_base::id::ContainerId;
use husk_base::{FileError, chain};
use husk_proto::{agent, cri};
use husk_volumes::ImageVolume;

use super::container_plan::ContainerPlan;
use super::log::open_log;
use super::ready::ready_pod;
use super::{oom_score, pin_cpus, remove_container, supervise, synced_volumes, vm_memory};
use crate::model::{Container, EventKind, Sandbox, SandboxOp, State, Unlocked, names};
use crate::{Error, Node, span};

/// Makes a container, or leaves nothing behind.
///
/// # Errors
/// The error names the part of the request that the container cannot have, or the step that failed.
pub async fn create_container(
    node: &Arc<Node>,
    sandbox_id: &str,
    config: cri::ContainerConfig,
) -> Result<ContainerId, Error> {
    let sandbox = node.registry.sandbox(sandbox_id)?;
    let mut unlocked = Unlocked::new();
    let op = sandbox.lock_op(&mut unlocked).await;
    let running = ready_pod(&sandbox)?;
    runs_nothing_unknown(node, &sandbox)?;
    let id = ContainerId::random();
    span::note_container(&id);
    let name = node.registry.reserve(names::container(&config, &sandbox.record().config), id.as_str())?;
    let mut plan = ContainerPlan::new(node, &op, &id, config).await?;

    let mut disks = running.disks.hold().await;
    let claims = disks.claim_all(plan.images.iter().map(std::path::PathBuf::as_path), &id);
    let claims = claims.ok_or_else(|| husk_vm::Error::NoSlot(disks.count()))?;
    let container = match Container::create(sandbox.directory(), plan.record(&claims)).await {
        Ok(container) => Arc::new(container),
        Err(error) => {
            disks.unclaim(&claims, &id);
            return Err(error.into());
        }
    };
    node.registry.add_container(sandbox.clone(), container.clone());
    let made = async {
        pin_cpus::pin(node, &sandbox)?;
        for (claim, rootfs) in claims.iter().zip(&plan.images) {
            if let Claim::Attach(disk) = claim {
                running.backend.attach_image(disk, rootfs).await?;
            }
        }
        // From here on others may use the disks too.
        drop(disks);
        mount_volumes(node, &op, &running, &mut plan).await?;
        oom_score::set(node, &sandbox);
        make(&sandbox, &running, &container, plan).await
    };
    // The pod may have ended meanwhile: whoever recorded that left this one out.
    let made = made.await.and_then(|()| ready_pod(&sandbox).map(drop));
    if let Err(error) = made {
        let error = vm_memory::explain(&sandbox, &running, error).await;
        tracing::warn!(error = chain(&error), "container was not made; undoing");
        undo(node, &op, &container).await;
        return Err(error);
    }
    name.keep();
    sandbox.send_event(id.as_str(), EventKind::Created);
    tracing::info!("container created");
    Ok(id)
}

/// A pod with a container of which neither the name nor the disks could be told
/// gets no other: it could be the same one again, or take its disks away.
fn runs_nothing_unknown(node: &Node, sandbox: &Sandbox) -> Result<(), Error> {
    let unread = node.registry.unread_of(&sandbox.id);
    match unread.iter().find(|unread| unread.name.is_none() || unread.disks.is_none()) {
        Some(unread) => Err(Error::WrongState(format!(
            "the pod has a container `{}` of which nothing is known: {}",
            unread.id,
            unread.advice()
        ))),
        None => Ok(()),
    }
}

/// Tears down what was not made: now, or in the background until it is done.
async fn undo(node: &Arc<Node>, sandbox: &SandboxOp<'_>, container: &Arc<Container>) {
    if let Err(undo) = remove_container::tear_down(node, sandbox, container).await {
        tracing::warn!(error = chain(&undo), "failed to undo a container that was not made; trying again");
        remove_container::retry_tear_down(node, sandbox, container);
    }
}

/// Copies the volumes that are synced, and mounts the others.
async fn mount_volumes(
    node: &Node,
    sandbox: &SandboxOp<'_>,
    running: &RunningPod,
    plan: &mut ContainerPlan,
) -> Result<(), Error> {
    for one in plan.volumes.iter().filter(|one| one.volume.synced) {
        synced_volumes::send(running, &one.volume).await?;
    }
    if plan.volumes.iter().all(|one| one.volume.synced) {
        return Ok(());
    }
    let record = sandbox.record();
    let handler = node.config.handler(&record.handler).and_then(|(_, handler)| handler.vm());
    let program = handler.map(|handler| handler.file_server.as_path());
    let users = husk_oci::user_namespace(&record.config)?;
    let server = FileServer { handler: &record.handler, users, program };
    let Some(mounts) = plan.place.volume_mounts(running, server).await? else { return Ok(()) };
    let (volumes, in_use) = (mem::take(&mut plan.volumes), mem::take(&mut plan.volumes_in_use));
    Ok(sandbox.lane.run("mount volumes", move || mounts.add(&volumes, &in_use)).await??)
}

/// The agent makes the container, and its output is followed from the first
/// byte on.
async fn make(
    sandbox: &Arc<Sandbox>,
    running: &Arc<RunningPod>,
    container: &Arc<Container>,
    plan: ContainerPlan,
) -> Result<(), Error> {
    let record = container.record();
    open_log(sandbox, container).await?;
    let request = agent::CreateContainerRequest {
        container_id: container.id.to_string(),
        spec_json: serde_json::to_vec(&plan.spec)
            .map_err(|error| Error::Broken(format!("create container: {error}")))?,
        rootfs: Some(running.backend.rootfs(&record.image_slot, &record.image_rootfs)),
        image_volumes: record.image_volumes.iter().map(|volume| image_volume_of(running, volume)).collect(),
        user: Some(plan.user),
        terminal: record.config.tty,
        stdin: record.config.stdin,
        stdin_once: record.config.stdin_once,
        apparmor: plan.apparmor,
        all_devices: husk_oci::privileged(&record.config),
    };
    let made = running
        .agent
        .call("create container", async |mut agent| agent.create_container(request).await)
        .await?;
    if !made.start_error.is_empty() {
        // The program cannot be started. StartContainer says so.
        container
            .update(|record| {
                record.start_error = made.start_error;
                record.state = State::Created;
            })
            .await?;
        return Ok(());
    }
    let followed = supervise::follow(sandbox, running, container).await;
    let id = Path::new(container.id.as_str());
    followed.map_err(FileError::at("open the output of container", id))?;
    synced_volumes::follow(running, container);
    container
        .update(|record| {
            record.guest_pid = made.pid;
            record.user = made.identity.map(|identity| cri::LinuxContainerUser {
                uid: identity.uid.into(),
                gid: identity.gid.into(),
                supplemental_groups: identity.groups.into_iter().map(i64::from).collect(),
            });
            record.state = State::Created;
        })
        .await?;
    Ok(())
}

fn image_volume_of(running: &RunningPod, volume: &ImageVolume) -> agent::ImageVolume {
    agent::ImageVolume {
        image: Some(running.backend.rootfs(&volume.slot, &volume.rootfs)),
        destination: volume.container_path.display().to_string(),
        sub_path: volume.sub_path.clone(),
    }
}
