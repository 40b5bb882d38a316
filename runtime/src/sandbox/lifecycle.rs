//! What several verbs and the recovery share of a sandbox's end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::ShutdownRequest;

use super::{Phase, Sandbox, Version, Versions, clock};
use crate::config::Kind;
use crate::container::{Exit, State, supervise};
use crate::cri::error::Error;
use crate::events::EventKind;
use crate::host;
use crate::node::Node;
use crate::storage::volumes::Shared;
use crate::vm::{self, Ending, Keeper, Machine};

/// Most time that containers get to end once they have been killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Most time that hooks get which run once a container has been deleted: a
/// little more than the agent gives them.
const HOOKS_TIMEOUT: Duration = Duration::from_secs(25);

/// How soon a pod that could not be undone is tried again, and then twice as long
/// each time.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How long that becomes.
const AT_THE_LATEST: Duration = Duration::from_secs(60);

/// Watches a machine, so that its end is known when nobody asked for it, and
/// keeps its clock. Asks, too, which releases its programs are of.
pub fn watch(sandbox: &Arc<Sandbox>, machine: &Arc<Machine>) {
    tokio::spawn(ask_versions(sandbox.clone(), machine.clone()));
    let (sandbox, keeper, agent) = (sandbox.clone(), machine.keeper.clone(), machine.agent.clone());
    let (cgroup, oom_kills) = {
        let record = sandbox.record();
        (record.cgroup.clone(), record.oom_kills)
    };
    tokio::spawn(async move {
        let clock = async {
            match &keeper {
                Keeper::Vmm(_) => clock::keep(&agent).await,
                Keeper::Supervisor(_) => std::future::pending().await,
            }
        };
        let ending = tokio::select! {
            ending = keeper.wait(cgroup.as_deref(), oom_kills) => ending,
            never = clock => match never {},
        };
        if sandbox.record().phase != Phase::Ready {
            return;
        }
        tracing::warn!(sandbox = %sandbox.id, problem = ending.problem, "machine ended unasked");
        ended(&sandbox, &ending);
    });
}

/// Notes which releases a pod's programs are of, for people. None is refused: what
/// lives is used as far as it can be.
async fn ask_versions(sandbox: Arc<Sandbox>, machine: Arc<Machine>) {
    let mut versions = Versions::default();
    if let Keeper::Vmm(vmm) = &machine.keeper
        && let Ok(info) = vmm.control.info().await
    {
        if info.protocol > husk_vmm_api::PROTOCOL {
            tracing::warn!(sandbox = %sandbox.id, release = info.release, "the pod's VMM is of a later release");
        }
        versions.vmm = Some(Version { protocol: info.protocol, release: info.release });
    }
    if let Ok((protocol, release)) = machine.agent.hello().await {
        if protocol > husk_proto::agent::PROTOCOL {
            tracing::warn!(sandbox = %sandbox.id, release, "the pod's agent is of a later release");
        }
        versions.agent = Some(Version { protocol, release });
    }
    sandbox.set_versions(versions);
}

/// Records that a sandbox's machine has gone, and its containers with it.
pub fn ended(sandbox: &Sandbox, ending: &Ending) {
    let problem = ending.problem.as_str();
    sandbox.note(|record| {
        record.phase = Phase::NotReady;
        if !problem.is_empty() {
            record.problem = problem.to_owned();
        }
    });
    let had_machine = sandbox.set_machine(None).is_some();
    sandbox.set_unreached(None);
    for container in sandbox.containers() {
        container.dismiss();
        if container.state() == State::Creating {
            // Nobody knows it, and whoever makes it undoes it.
            continue;
        }
        let exit = match problem {
            "" => Exit::machine_gone("the pod was stopped"),
            _ if ending.out_of_memory => Exit::out_of_memory(problem),
            _ => Exit::machine_gone(problem),
        };
        sandbox.container_ended(&container, exit);
    }
    if had_machine {
        sandbox.send_event(sandbox.id.as_str(), EventKind::Stopped);
    }
}

/// Stops a sandbox: its containers, its machine, its network, its disk. Each
/// step finds out for itself whether there is anything to do, so this can be
/// repeated, and does its work after a crash as well.
///
/// # Errors
/// With what could not be given back; stopping again tries again.
pub async fn stop(node: &Node, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    stop_for(node, sandbox, &Ending::default()).await
}

/// As [`stop`], of a sandbox that has ended by itself.
///
/// # Errors
/// The same.
pub async fn stop_for(node: &Node, sandbox: &Arc<Sandbox>, ending: &Ending) -> Result<(), Error> {
    let machine = sandbox.machine();
    if let Some(machine) = &machine {
        kill_containers(sandbox, machine).await;
    }
    sandbox.note(|record| record.phase = Phase::NotReady);
    if let Some(machine) = &machine {
        run_poststop_hooks(sandbox, machine).await;
    }
    let cgroup = sandbox.record().cgroup.clone();
    let (machine, network) =
        tokio::join!(end_machine(node, sandbox, cgroup.as_deref()), node.network.detach(sandbox.id.as_str()));
    machine?;
    ended(sandbox, ending);
    forget_unmade(node, sandbox)?;
    network?;
    // The machine's file server goes with the machine.
    Shared::of(&node.config.run_dir, &sandbox.id).close()?;
    if let Some(cgroup) = cgroup {
        vm::remove_cgroup(&cgroup).await.map_err(|cause| Error::File {
            stage: "remove control group",
            path: cgroup,
            cause,
        })?;
    }
    remove_layers(sandbox).await?;
    let scratch = sandbox.scratch();
    match std::fs::remove_file(&scratch) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::File { stage: "remove sandbox disk", path: scratch, cause })
        }
        _ => Ok(()),
    }
}

/// Forgets containers that were never made, and could not be taken apart while
/// there was a machine.
fn forget_unmade(node: &Node, sandbox: &Sandbox) -> Result<(), Error> {
    for container in sandbox.containers() {
        if container.state() == State::Creating {
            container.forget()?;
            node.registry.remove_container(&container);
        }
    }
    Ok(())
}

/// Removes what the containers of a host pod have written, which may be much.
async fn remove_layers(sandbox: &Sandbox) -> Result<(), Error> {
    let layers = sandbox.layers();
    let path = layers.clone();
    let removed = tokio::task::spawn_blocking(move || host::remove_tree(&path)).await;
    removed.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|cause| Error::File {
        stage: "remove writable layers",
        path: layers,
        cause,
    })
}

/// Ends the machine by its own socket, or, when nobody answers there, by its
/// control group. A host pod has only that.
async fn end_machine(node: &Node, sandbox: &Sandbox, cgroup: Option<&Path>) -> Result<(), Error> {
    let run_dir = vm::run_dir(&node.config.run_dir, &sandbox.id);
    if sandbox.record().kind == Kind::Host {
        return Ok(host::destroy(&run_dir, cgroup).await?);
    }
    let Err(error) = vm::destroy(&run_dir).await else { return Ok(()) };
    tracing::warn!(sandbox = %sandbox.id, %error, "the VMM does not end when asked; killing it");
    match cgroup.map(vm::kill_cgroup) {
        Some(Ok(())) => Ok(vm::destroy(&run_dir).await?),
        Some(Err(_)) | None => Err(error.into()),
    }
}

/// Gives containers that still run their end, so that the last of their output
/// is in their logs and their exit codes are true.
async fn kill_containers(sandbox: &Sandbox, machine: &Machine) {
    let running: Vec<_> =
        sandbox.containers().into_iter().filter(|container| container.state() == State::Running).collect();
    let ends = running.iter().map(|container| async {
        if let Err(error) = supervise::signal(machine, &container.id, libc::SIGKILL, true).await {
            tracing::debug!(container = %container.id, %error, "kill container");
            return;
        }
        let _ = tokio::time::timeout(KILL_TIMEOUT, container.wait_exited()).await;
    });
    let _ = tokio::time::timeout(KILL_TIMEOUT * 2, futures::future::join_all(ends)).await;
}

/// Has the agent delete the containers, so that their `poststop` hooks run: when
/// the machine or the processes go, nobody runs them. It ends with that, so the
/// sandbox must be noted as not ready before.
async fn run_poststop_hooks(sandbox: &Sandbox, machine: &Machine) {
    if !sandbox.containers().iter().any(|container| container.record().poststop) {
        return;
    }
    let mut agent = machine.agent.unlimited();
    match tokio::time::timeout(HOOKS_TIMEOUT, agent.shutdown(ShutdownRequest {})).await {
        Ok(Ok(_)) => {}
        Ok(Err(status)) => {
            tracing::warn!(sandbox = %sandbox.id, message = status.message(), "run poststop hooks");
        }
        Err(_) => {
            let seconds = HOOKS_TIMEOUT.as_secs();
            tracing::warn!(sandbox = %sandbox.id, seconds, "poststop hooks have not ended in time");
        }
    }
}

/// Takes a sandbox apart that was never ready: no client knows it.
///
/// # Errors
/// With what could not be given back.
pub async fn undo(node: &Node, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    stop(node, sandbox).await?;
    forget(node, sandbox)
}

/// As [`undo`], again until it is done: nobody else would come back to it. What
/// keeps it from being done is shown in the runtime's status meanwhile.
pub fn undo_later(node: &Arc<Node>, sandbox: &Arc<Sandbox>) {
    let (node, sandbox) = (node.clone(), sandbox.clone());
    tokio::spawn(async move {
        let mut pause = TRY_AGAIN;
        loop {
            let undone = {
                let _verb = sandbox.verb.lock().await;
                undo(&node, &sandbox).await
            };
            match undone {
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(sandbox = %sandbox.id, %error, "undo a pod that was never ready; trying again");
                    node.registry.set_unfinished(&sandbox.id, Some(error.to_string()));
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AT_THE_LATEST);
        }
        node.registry.set_unfinished(&sandbox.id, None);
        tracing::info!(sandbox = %sandbox.id, "a pod that was never ready is undone");
    });
}

/// Removes what [`stop`] leaves: the records.
///
/// # Errors
/// The disk's.
pub fn forget(node: &Node, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    match std::fs::remove_dir_all(sandbox.directory()) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::File {
                stage: "remove sandbox record",
                path: sandbox.directory().into(),
                cause,
            });
        }
        _ => {}
    }
    for container in sandbox.containers() {
        node.registry.remove_container(&container);
    }
    node.registry.remove_sandbox(&sandbox.id);
    Ok(())
}
