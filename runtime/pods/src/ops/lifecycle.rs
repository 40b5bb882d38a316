//! The end of a pod, asked for or not.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_backend::{Ending, RunningPod};
use husk_base::{FileError, blocking, chain};
use husk_proto::agent::ShutdownRequest;
use tracing::Instrument;

use super::pauses::Pauses;
use super::{clock, supervise};
use crate::model::{
    EventKind, Exit, LookupError, Phase, Sandbox, SandboxOp, State, Unlocked, Version, Versions,
};
use crate::{Error, Node};

/// Most time that containers get to end once they have been killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Most time that hooks get which run once a container has been deleted: a
/// little more than the agent gives them.
const HOOKS_TIMEOUT: Duration = Duration::from_secs(25);

/// Watches a pod, so that its end is known when nobody asked for it, and keeps its
/// clock. Asks, too, which releases its programs are of.
pub(crate) fn watch(sandbox: &Arc<Sandbox>, running: &Arc<RunningPod>) {
    tokio::spawn(ask_versions(sandbox.clone(), running.clone()).instrument(sandbox.span()));
    let (sandbox, backend, agent) = (sandbox.clone(), running.backend.clone(), running.agent.clone());
    let (record, span) = (sandbox.record(), sandbox.span());
    let watch = async move {
        let clock = async {
            if backend.has_clock() { clock::keep(&agent).await } else { std::future::pending().await }
        };
        let ending = tokio::select! {
            ending = backend.wait(record.cgroup.as_deref(), record.oom_kills) => ending,
            never = clock => match never {},
        };
        if sandbox.record().phase != Phase::Ready {
            return;
        }
        tracing::warn!(problem = ending.problem, "pod ended unasked");
        ended(&sandbox, &ending).await;
    };
    tokio::spawn(watch.instrument(span));
}

/// Notes which releases a pod's programs are of, for people. None is refused: what
/// lives is used as far as it can be.
async fn ask_versions(sandbox: Arc<Sandbox>, running: Arc<RunningPod>) {
    let mut versions = Versions::default();
    if let Some((protocol, release)) = running.backend.vmm_version().await {
        if protocol > husk_vmm_api::PROTOCOL {
            tracing::warn!(release, "the pod's VMM is of a later release");
        }
        versions.vmm = Some(Version { protocol, release });
    }
    if let Ok((protocol, release)) = running.agent.hello().await {
        if protocol > husk_proto::agent::PROTOCOL {
            tracing::warn!(release, "the pod's agent is of a later release");
        }
        versions.agent = Some(Version { protocol, release });
    }
    sandbox.set_versions(versions);
}

/// Records that a pod has ended, and its containers with it.
pub(crate) async fn ended(sandbox: &Sandbox, ending: &Ending) {
    let problem = ending.problem.as_str();
    sandbox
        .update_best_effort(|record| {
            record.phase = Phase::NotReady;
            if !problem.is_empty() {
                record.problem = problem.to_owned();
            }
        })
        .await;
    let ran = sandbox.set_running(None).is_some();
    sandbox.set_unreached(None);
    for container in sandbox.containers() {
        container.abort_tasks();
        if container.record().state == State::Creating {
            // Nobody knows it, and whoever makes it undoes it.
            continue;
        }
        let exit = match problem {
            "" => Exit::machine_gone("the pod was stopped"),
            _ if ending.out_of_memory => Exit::out_of_memory(problem),
            _ => Exit::machine_gone(problem),
        };
        sandbox.container_ended(&container, exit).await;
    }
    if ran {
        sandbox.send_event(sandbox.id.as_str(), EventKind::Stopped);
    }
}

/// Stops a pod: everything of it is given back but its records. One that is not
/// known has nothing to give back.
///
/// # Errors
/// The error names what could not be given back; stopping again tries again.
pub async fn stop_sandbox(node: &Node, id: &str) -> Result<(), Error> {
    let sandbox = match node.registry.sandbox(id) {
        Err(LookupError::Unknown { .. }) => return Ok(()),
        found => found?,
    };
    let mut unlocked = Unlocked::new();
    let op = sandbox.lock_op(&mut unlocked).await;
    stop(node, &op).await?;
    tracing::info!("pod stopped");
    Ok(())
}

/// Stops a pod that still runs, and forgets it with all its containers. One that is
/// not known is removed already.
///
/// # Errors
/// The error names what could not be given back or removed; it can be repeated.
pub async fn remove_sandbox(node: &Node, id: &str) -> Result<(), Error> {
    let sandbox = match node.registry.sandbox(id) {
        Err(LookupError::Unknown { .. }) => return Ok(()),
        found => found?,
    };
    let mut unlocked = Unlocked::new();
    let op = sandbox.lock_op(&mut unlocked).await;
    stop(node, &op).await?;
    let containers = sandbox.containers();
    forget(node, &op).await?;
    let ids = containers.iter().map(|container| container.id.as_str());
    for id in ids.chain([sandbox.id.as_str()]) {
        sandbox.send_event(id, EventKind::Deleted);
    }
    tracing::info!("pod removed");
    Ok(())
}

/// Stops a sandbox: its containers, what it runs in, its network, its disk. Each
/// step finds out for itself whether there is anything to do, so this can be
/// repeated, and does its work after a crash as well.
///
/// # Errors
/// The error names what could not be given back; stopping again tries again.
pub(crate) async fn stop(node: &Node, op: &SandboxOp<'_>) -> Result<(), Error> {
    stop_for(node, op, &Ending::default()).await
}

/// Like [`stop`], for a sandbox that has ended by itself.
///
/// # Errors
/// The errors are those of [`stop`].
pub(crate) async fn stop_for(node: &Node, op: &SandboxOp<'_>, ending: &Ending) -> Result<(), Error> {
    let sandbox: &Sandbox = op;
    let running = sandbox.running();
    if let Some(running) = &running {
        kill_containers(sandbox, running).await;
    }
    sandbox.update_best_effort(|record| record.phase = Phase::NotReady).await;
    if let Some(running) = &running {
        run_poststop_hooks(sandbox, running).await;
    }
    let place = sandbox.place(&node.config.run_dir);
    let (destroyed, network) = tokio::join!(place.destroy(), node.network.detach(sandbox.id.as_str()));
    destroyed?;
    ended(sandbox, ending).await;
    forget_unmade(node, op).await?;
    network?;
    place.close_volumes().await?;
    place.remove_cgroup().await?;
    remove_layers(sandbox).await?;
    let scratch = sandbox.scratch();
    match tokio::fs::remove_file(&scratch).await {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(FileError::at("remove sandbox disk", &scratch)(cause).into())
        }
        _ => Ok(()),
    }
}

/// Forgets containers that were never made, and could not be torn down while
/// there was a machine.
async fn forget_unmade(node: &Node, op: &SandboxOp<'_>) -> Result<(), Error> {
    for container in op.containers() {
        if container.record().state == State::Creating {
            container.forget().await?;
            node.registry.remove_container(&container);
        }
    }
    Ok(())
}

/// Removes what the containers of a host pod have written, which may be much.
async fn remove_layers(sandbox: &Sandbox) -> Result<(), Error> {
    let path = sandbox.layers();
    let removed = remove_tree(&path).await;
    Ok(removed.map_err(FileError::at("remove writable layers", &path))?)
}

/// Removes a folder with all that is in it.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
pub(super) async fn remove_tree(path: &Path) -> io::Result<()> {
    let path = path.to_owned();
    blocking(move || husk_base::remove_tree(&path)).await
}

/// Gives containers that still run their end, so that the last of their output
/// is in their logs and their exit codes are true.
async fn kill_containers(sandbox: &Sandbox, running: &RunningPod) {
    let containers: Vec<_> = sandbox
        .containers()
        .into_iter()
        .filter(|container| container.record().state == State::Running)
        .collect();
    let ends = containers.iter().map(|container| async {
        if let Err(error) = supervise::signal(running, &container.id, libc::SIGKILL, true).await {
            tracing::debug!(container = %container.id, error = chain(&error), "failed to kill a container");
            return;
        }
        let _ = tokio::time::timeout(KILL_TIMEOUT, container.wait_exited()).await;
    });
    let _ = tokio::time::timeout(KILL_TIMEOUT * 2, futures::future::join_all(ends)).await;
}

/// Has the agent delete the containers, so that their `poststop` hooks run: when
/// the machine or the processes go, nobody runs them. It ends with that, so the
/// sandbox must be noted as not ready before.
async fn run_poststop_hooks(sandbox: &Sandbox, running: &RunningPod) {
    if !sandbox.containers().iter().any(|container| container.record().poststop) {
        return;
    }
    let mut agent = running.agent.unlimited();
    match tokio::time::timeout(HOOKS_TIMEOUT, agent.shutdown(ShutdownRequest {})).await {
        Ok(Ok(_)) => {}
        Ok(Err(status)) => {
            tracing::warn!(message = status.message(), "failed to run poststop hooks");
        }
        Err(_) => {
            let seconds = HOOKS_TIMEOUT.as_secs();
            tracing::warn!(seconds, "poststop hooks have not ended in time");
        }
    }
}

/// Tears down a pod that was never ready: no client knows it.
///
/// # Errors
/// The error names what could not be given back.
pub(crate) async fn undo(node: &Node, op: &SandboxOp<'_>) -> Result<(), Error> {
    stop(node, op).await?;
    forget(node, op).await
}

/// Repeats [`undo`] until it is done: nobody else would come back to the pod. The
/// runtime's status shows meanwhile why it is not done.
pub(crate) fn undo_later(node: &Arc<Node>, sandbox: &Arc<Sandbox>) {
    let (node, sandbox, span) = (node.clone(), sandbox.clone(), sandbox.span());
    let retry = async move {
        let mut pauses = Pauses::new();
        loop {
            let undone = {
                let mut unlocked = Unlocked::new();
                let op = sandbox.lock_op(&mut unlocked).await;
                undo(&node, &op).await
            };
            match undone {
                Ok(()) => break,
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(error, "failed to undo a pod that was never ready; trying again");
                    node.registry.set_unfinished(&sandbox.id, Some(error));
                }
            }
            pauses.wait().await;
        }
        node.registry.set_unfinished(&sandbox.id, None);
        tracing::info!("a pod that was never ready is undone");
    };
    tokio::spawn(retry.instrument(span));
}

/// Removes what [`stop`] leaves: the records.
///
/// # Errors
/// The disk refuses it.
pub(crate) async fn forget(node: &Node, sandbox: &SandboxOp<'_>) -> Result<(), Error> {
    match tokio::fs::remove_dir_all(sandbox.directory()).await {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            return Err(FileError::at("remove sandbox record", sandbox.directory())(cause).into());
        }
        _ => {}
    }
    for container in sandbox.containers() {
        node.registry.remove_container(&container);
    }
    node.registry.remove_sandbox(&sandbox.id);
    Ok(())
}
