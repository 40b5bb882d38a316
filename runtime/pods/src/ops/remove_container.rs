//! Removing a container: kills what runs, and forgets the container.

use std::sync::Arc;
use std::time::Duration;

use husk_base::chain;
use husk_proto::agent;
use tracing::Instrument;

use super::pauses::Pauses;
use super::ready::ready_pod;
use super::{oom_score, pin_cpus};
use crate::model::{Container, EventKind, LookupError, Phase, Sandbox, SandboxOp, State, Unlocked};
use crate::{Error, Node};

/// Most time from the removal of a container in its machine to the news of its
/// end.
const END: Duration = Duration::from_secs(5);

/// Removes a container. One that is not known is removed already.
///
/// # Errors
/// The error names what could not be removed; it can be repeated.
pub async fn remove_container(node: &Arc<Node>, id: &str) -> Result<(), Error> {
    let (sandbox, container) = match node.registry.container(id) {
        Err(LookupError::Unknown { .. }) => return Ok(()),
        found => found?,
    };
    let mut unlocked = Unlocked::new();
    let mut op = container.lock_op(&mut unlocked).await;
    let started = matches!(container.record().state, State::Running | State::Exited(_));
    leave_pod(&sandbox, &container).await?;
    {
        // A container being made counts on the volumes that others have, and
        // must not find them unmounted.
        let sandbox = sandbox.lock_op(&mut op).await;
        release(node, &sandbox, &container).await?;
    }
    if started {
        // The agent said that it has ended: the end is told before the removal.
        let _ = tokio::time::timeout(END, container.wait_exited()).await;
    }
    // Clients may be attached to a container that never started.
    container.output.end();
    sandbox.send_event(container.id.as_str(), EventKind::Deleted);
    tracing::info!("container removed");
    Ok(())
}

/// Unmounts what no other container of the pod uses.
async fn release_volumes(node: &Node, sandbox: &SandboxOp<'_>, container: &Container) -> Result<(), Error> {
    if !node.registry.unread_of(&sandbox.id).is_empty() {
        // Nobody can say what those use: volumes go with the pod.
        return Ok(());
    }
    let others = sandbox.containers();
    let others = others.iter().filter(|other| other.id != container.id);
    let others: Vec<_> = others.map(|other| other.record()).collect();
    let in_use = |name: &str| others.iter().any(|other| other.volumes.iter().any(|one| one.name == name));
    let record = container.record();
    let names = record.volumes.iter().map(|volume| volume.name.clone());
    let unused = names.filter(|name| !in_use(name)).collect();
    Ok(sandbox.place(&node.config.run_dir).release_volumes(unused).await?)
}

/// Removes a container in whatever state it is, half-made ones included. Can be
/// repeated.
///
/// # Errors
/// The error names what could not be removed; the record stays then.
pub(crate) async fn tear_down(
    node: &Node,
    sandbox: &SandboxOp<'_>,
    container: &Arc<Container>,
) -> Result<(), Error> {
    leave_pod(sandbox, container).await?;
    release(node, sandbox, container).await
}

/// Like [`tear_down`], again until it is done: after a failure nobody else would
/// come back to it, for no client knows it.
pub(crate) fn retry_tear_down(node: &Arc<Node>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) {
    let (node, sandbox, container) = (node.clone(), sandbox.clone(), container.clone());
    let span = container.span();
    let retry = async move {
        let mut pauses = Pauses::new();
        loop {
            pauses.wait().await;
            let mut unlocked = Unlocked::new();
            let op = sandbox.lock_op(&mut unlocked).await;
            if sandbox.record().phase != Phase::Ready {
                // The container goes with its pod.
                return;
            }
            match tear_down(&node, &op, &container).await {
                Ok(()) => {
                    return tracing::info!("container that was not made is gone");
                }
                Err(error) => {
                    tracing::warn!(
                        error = chain(&error),
                        "failed to undo a container that was not made; trying again"
                    );
                }
            }
        }
    };
    tokio::spawn(retry.instrument(span));
}

/// Removes it from its pod, if that runs, and gives back its disks.
async fn leave_pod(sandbox: &Sandbox, container: &Container) -> Result<(), Error> {
    let phase = sandbox.record().phase;
    let running = match phase {
        Phase::Ready => Some(ready_pod(sandbox)?),
        Phase::Creating | Phase::NotReady => sandbox.running(),
    };
    let Some(running) = running else { return Ok(()) };
    let request = agent::RemoveContainerRequest { container_id: container.id.to_string() };
    running.agent.call("remove container", async |mut agent| agent.remove_container(request).await).await?;
    let disks: Vec<_> = container.record().disks().collect();
    let mut held = running.disks.hold().await;
    for (slot, _) in disks {
        if held.release(&slot, &container.id) {
            running.backend.detach_image(slot.clone()).await?;
            held.emptied(&slot);
        }
    }
    Ok(())
}

/// Gives back what it has of the host, and forgets it.
async fn release(node: &Node, sandbox: &SandboxOp<'_>, container: &Arc<Container>) -> Result<(), Error> {
    container.abort_tasks();
    release_volumes(node, sandbox, container).await?;
    container.forget().await?;
    node.registry.remove_container(container);
    oom_score::set(node, sandbox);
    if let Err(error) = pin_cpus::pin(node, sandbox) {
        tracing::debug!(error = chain(&error), "failed to pin what is left of a pod to CPUs");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use husk_agent_client::fake::Fake;
    use husk_base::lock;
    use husk_config::Kind;

    use super::*;
    use crate::test_util;

    /// A pod and its container, as a node knows them.
    async fn known(folder: &Path, phase: Phase, state: State) -> (Arc<Node>, Arc<Sandbox>, Arc<Container>) {
        let node = test_util::node(folder);
        let sandbox = test_util::sandbox(&node, Kind::Vm, phase).await;
        let container = test_util::container(&sandbox, state).await;
        node.registry.add_sandbox(sandbox.clone());
        node.registry.add_container(sandbox.clone(), container.clone());
        (node, sandbox, container)
    }

    #[tokio::test]
    async fn what_could_not_be_taken_apart_is_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let (node, sandbox, container) = known(folder.path(), Phase::Ready, State::Creating).await;
        let refusals = vec![tonic::Code::FailedPrecondition; 2].into();
        let fake = Arc::new(Fake { refusals, ..Default::default() });
        let agent = fake.serve(folder.path(), Duration::from_secs(20)).await;
        sandbox.set_running(Some(test_util::pod_of(agent)));
        {
            let mut unlocked = Unlocked::new();
            let op = sandbox.lock_op(&mut unlocked).await;
            tear_down(&node, &op, &container).await.unwrap_err();
        }
        retry_tear_down(&node, &sandbox, &container);
        let gone = async {
            while node.registry.container(container.id.as_str()).is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(crate::ops::pauses::FIRST * 10, gone).await.unwrap();
        assert!(lock(&fake.refusals).is_empty());
    }

    #[tokio::test]
    async fn no_volume_goes_while_a_container_is_made_that_may_count_on_it() {
        let folder = tempfile::tempdir().unwrap();
        let (node, sandbox, container) = known(folder.path(), Phase::NotReady, State::Created).await;
        let known = || node.registry.container(container.id.as_str()).is_ok();
        // As a container that is being made has it, from its look at the volumes on.
        let mut unlocked = Unlocked::new();
        let making = sandbox.lock_op(&mut unlocked).await;
        let removal = {
            let (node, id) = (node.clone(), container.id.clone());
            tokio::spawn(async move { remove_container(&node, id.as_str()).await })
        };
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(known() && !removal.is_finished());
        drop(making);
        tokio::time::timeout(END, removal).await.unwrap().unwrap().unwrap();
        assert!(!known());
    }
}
