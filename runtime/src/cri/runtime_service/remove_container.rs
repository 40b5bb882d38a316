//! RemoveContainer: kills what runs, and forgets the container. One that is not
//! known is removed already.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent;
use husk_proto::cri::{RemoveContainerRequest, RemoveContainerResponse};

use super::create_container::ready_machine;
use crate::container::{Container, State};
use crate::cri::error::Error;
use crate::events::EventKind;
use crate::node::Node;
use crate::sandbox::registry::LookupError;
use crate::sandbox::{Phase, Sandbox, cpus, oom_score};
use crate::storage::volumes::Shared;
use crate::vm::{self, file_server};

/// Most time from the removal of a container in its machine to the news of its
/// end.
const END: Duration = Duration::from_secs(5);

/// How soon a container that could not be taken apart is tried again, and then
/// twice as long each time.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How long that becomes.
const AT_THE_LATEST: Duration = Duration::from_secs(60);

pub(super) async fn remove_container(
    node: &Arc<Node>,
    request: RemoveContainerRequest,
) -> Result<RemoveContainerResponse, Error> {
    let (sandbox, container) = match node.registry.container(&request.container_id) {
        Err(LookupError::Unknown { .. }) => return Ok(RemoveContainerResponse {}),
        found => found?,
    };
    let _verb = container.verb.lock().await;
    let started = matches!(container.state(), State::Running | State::Exited(_));
    leave_machine(&sandbox, &container).await?;
    {
        // A container being made counts on the volumes that others have, and
        // must not find them unmounted.
        let _verb = sandbox.verb.lock().await;
        give_back(node, &sandbox, &container)?;
    }
    if started {
        // It has ended, as the agent said; its end is told before its removal.
        let _ = tokio::time::timeout(END, container.wait_exited()).await;
    }
    sandbox.send_event(container.id.as_str(), EventKind::Deleted);
    tracing::info!(container = %container.id, "container removed");
    Ok(RemoveContainerResponse {})
}

/// Unmounts what no other container of the pod uses.
fn release_volumes(node: &Node, sandbox: &Sandbox, container: &Container) -> Result<(), Error> {
    if !node.registry.unread_of(&sandbox.id).is_empty() {
        // Nobody can say what those use: volumes go with the pod.
        return Ok(());
    }
    let others = sandbox.containers();
    let others = others.iter().filter(|other| other.id != container.id);
    let in_use: Vec<_> = others.flat_map(|other| other.record().volumes.clone()).collect();
    let shared = Shared::of(&node.config.run_dir, &sandbox.id);
    let namespace = file_server::namespace(&vm::run_dir(&node.config.run_dir, &sandbox.id))?;
    for volume in &container.record().volumes {
        if !in_use.iter().any(|other| other.name == volume.name) {
            shared.release(namespace.as_ref().map(AsFd::as_fd), &volume.name)?;
        }
    }
    Ok(())
}

/// Removes a container in whatever state it is, half-made ones included. Can be
/// repeated. The caller holds the sandbox's verb.
///
/// # Errors
/// With what could not be removed; the record stays then.
pub async fn take_apart(
    node: &Node,
    sandbox: &Arc<Sandbox>,
    container: &Arc<Container>,
) -> Result<(), Error> {
    leave_machine(sandbox, container).await?;
    give_back(node, sandbox, container)
}

/// As [`take_apart`], again until it is done: after a failure nobody else would
/// come back to it, for no client knows it.
pub fn take_apart_later(node: &Arc<Node>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) {
    let (node, sandbox, container) = (node.clone(), sandbox.clone(), container.clone());
    tokio::spawn(async move {
        let mut pause = TRY_AGAIN;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AT_THE_LATEST);
            let _verb = sandbox.verb.lock().await;
            if sandbox.record().phase != Phase::Ready {
                // It goes with its pod.
                return;
            }
            match take_apart(&node, &sandbox, &container).await {
                Ok(()) => {
                    return tracing::info!(container = %container.id, "container that was not made is gone");
                }
                Err(error) => {
                    tracing::warn!(container = %container.id, %error, "undo a container that was not made");
                }
            }
        }
    });
}

/// Removes it from its machine, if there is one, and gives back its disks.
async fn leave_machine(sandbox: &Sandbox, container: &Container) -> Result<(), Error> {
    let phase = sandbox.record().phase;
    let machine = match phase {
        Phase::Ready => Some(ready_machine(sandbox)?),
        Phase::Creating | Phase::NotReady => sandbox.machine(),
    };
    let Some(machine) = machine else { return Ok(()) };
    let request = agent::RemoveContainerRequest { container_id: container.id.to_string() };
    machine.agent.call("remove container", async |mut agent| agent.remove_container(request).await).await?;
    let disks: Vec<_> = container.record().disks().collect();
    let mut slots = machine.slots.hold().await;
    for (slot, _) in disks {
        if slots.release(&slot, &container.id) {
            machine.keeper.detach_image(slot.clone()).await?;
            slots.emptied(&slot);
        }
    }
    Ok(())
}

/// Gives back what it has of the host, and forgets it.
fn give_back(node: &Node, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> Result<(), Error> {
    container.dismiss();
    release_volumes(node, sandbox, container)?;
    container.forget()?;
    node.registry.remove_container(container);
    oom_score::settle(sandbox);
    if let Err(error) = cpus::pin(sandbox) {
        tracing::debug!(sandbox = %sandbox.id, %error, "pin what is left of the pod");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::*;
    use crate::agent::fake::Fake;
    use crate::config::Kind;
    use crate::sandbox::{lock, tests};

    /// A pod and its container, as a node knows them.
    fn known(folder: &Path, phase: Phase, state: State) -> (Arc<Node>, Arc<Sandbox>, Arc<Container>) {
        let node = tests::node(folder);
        let sandbox = tests::sandbox(&node, Kind::Vm, phase);
        let container = tests::container(&sandbox, state);
        node.registry.add_sandbox(sandbox.clone());
        node.registry.add_container(sandbox.clone(), container.clone());
        (node, sandbox, container)
    }

    #[tokio::test]
    async fn what_could_not_be_taken_apart_is_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let (node, sandbox, container) = known(folder.path(), Phase::Ready, State::Creating);
        let refusals = vec![tonic::Code::FailedPrecondition; 2].into();
        let fake = Arc::new(Fake { refusals, ..Default::default() });
        let agent = fake.serve(folder.path(), Duration::from_secs(20)).await;
        sandbox.set_machine(Some(tests::machine(agent)));
        take_apart(&node, &sandbox, &container).await.unwrap_err();
        take_apart_later(&node, &sandbox, &container);
        let gone = async {
            while node.registry.container(container.id.as_str()).is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(TRY_AGAIN * 10, gone).await.unwrap();
        assert!(lock(&fake.refusals).is_empty());
    }

    #[tokio::test]
    async fn no_volume_goes_while_a_container_is_made_that_may_count_on_it() {
        let folder = tempfile::tempdir().unwrap();
        let (node, sandbox, container) = known(folder.path(), Phase::NotReady, State::Created);
        let known = || node.registry.container(container.id.as_str()).is_ok();
        // As a container that is being made has it, from its look at the volumes on.
        let making = sandbox.verb.lock().await;
        let request = RemoveContainerRequest { container_id: container.id.to_string() };
        let removal = {
            let node = node.clone();
            tokio::spawn(async move { remove_container(&node, request).await })
        };
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(known() && !removal.is_finished());
        drop(making);
        tokio::time::timeout(END, removal).await.unwrap().unwrap().unwrap();
        assert!(!known());
    }
}
