//! What huskd does when it starts: finds what an earlier one left, takes over
//! what lives, and takes apart what is half-made or has died.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{Phase, Sandbox, lifecycle};
use crate::config::Kind;
use crate::container::{Container, State, supervise};
use crate::cri::error::Error;
use crate::cri::names;
use crate::host;
use crate::node::Node;
use crate::storage::volumes::{Shared, live};
use crate::vm::{self, Slots};

/// Brings records and reality together. A sandbox that gives trouble is logged
/// and kept as not ready, so that its client can stop and remove it; it never
/// keeps huskd from starting.
///
/// # Errors
/// A folder that cannot be read.
pub async fn recover(node: &Arc<Node>) -> std::io::Result<()> {
    let folder = node.sandboxes_dir();
    std::fs::create_dir_all(&folder)?;
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        match Sandbox::load(path.clone(), node.events.clone()) {
            Ok(sandbox) => {
                let sandbox = Arc::new(sandbox);
                if let Err(error) = recover_sandbox(node, &sandbox).await {
                    tracing::warn!(sandbox = %sandbox.id, %error, "recover sandbox");
                }
            }
            // The record is the first thing written into the folder: without
            // it nothing else was made.
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "sandbox record does not read; removed");
                std::fs::remove_dir_all(&path)?;
            }
        }
    }
    end_strays(node).await;
    // Before the first new pod: its addresses are on nobody's list.
    node.network.collect_garbage().await;
    tokio::spawn(check_networks(node.clone()));
    Ok(())
}

/// Says which pods are no longer connected as they were. Nobody waits for it.
async fn check_networks(node: Arc<Node>) {
    for sandbox in node.registry.sandboxes() {
        if sandbox.record().phase == Phase::Ready
            && let Err(error) = node.network.check(sandbox.id.as_str()).await
        {
            tracing::warn!(sandbox = %sandbox.id, %error, "the pod's network is not as it was");
        }
    }
}

async fn recover_sandbox(node: &Arc<Node>, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    let record = sandbox.record().clone();
    if record.phase == Phase::Creating {
        tracing::info!(sandbox = %sandbox.id, "take apart a sandbox that was never ready");
        lifecycle::stop(node, sandbox).await?;
        return lifecycle::forget(node, sandbox);
    }
    if let Ok(held) = node.registry.reserve(names::sandbox(&record.config), sandbox.id.as_str()) {
        held.keep();
    }
    node.registry.add_sandbox(sandbox.clone());
    load_containers(node, sandbox)?;
    if record.phase != Phase::Ready {
        return Ok(());
    }
    let Some((_, handler)) = node.config.handler(&record.handler) else {
        lifecycle::stop(node, sandbox).await?;
        return Ok(());
    };
    let used = sandbox.containers();
    let used = used.iter().flat_map(|container| {
        let disks: Vec<_> = container.record().disks().collect();
        disks.into_iter().map(|(slot, rootfs)| (container.id.clone(), slot, rootfs))
    });
    let run_dir = vm::run_dir(&node.config.run_dir, &sandbox.id);
    let timeout = Duration::from_secs(handler.agent_timeout_seconds);
    let reattached = match (record.kind, &record.cgroup) {
        (Kind::Vm, _) => {
            let slots = Slots::new(handler.image_slots).in_use(used);
            vm::reattach(&run_dir, slots, timeout).await.map_err(Error::from)
        }
        (Kind::Host, Some(cgroup)) => {
            let slots = Slots::unlimited().in_use(used);
            host::reattach(&run_dir, cgroup, slots, timeout).await.map_err(Error::from)
        }
        (Kind::Host, None) => Err(host::Error::NoCgroups.into()),
    };
    match reattached {
        Ok(machine) => {
            sandbox.set_machine(Some(machine.clone()));
            lifecycle::watch(sandbox, &machine);
            for container in sandbox.containers() {
                match container.state() {
                    State::Creating => {
                        crate::cri::runtime_service::remove_container::take_apart(node, sandbox, &container)
                            .await?
                    }
                    State::Created | State::Running => {
                        supervise::follow(sandbox, &machine, &container).await?;
                        live::follow(&machine, &container);
                    }
                    State::Exited(_) => {}
                }
            }
            tracing::info!(sandbox = %sandbox.id, "took over a running sandbox");
        }
        Err(error) => {
            let problem = match vm::last_words(&run_dir) {
                Some(exit) => vm::Error::from(exit).to_string(),
                None => error.to_string(),
            };
            tracing::warn!(sandbox = %sandbox.id, problem, "the sandbox's machine has gone");
            lifecycle::stop(node, sandbox).await?;
            sandbox.update(|record| record.problem = problem)?;
        }
    }
    Ok(())
}

fn load_containers(node: &Node, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    let folder = sandbox.directory().join("containers");
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(cause) => return Err(Error::File { stage: "read container records", path: folder, cause }),
    };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| is_record(path)) {
        match Container::load(path.clone()) {
            Ok(container) => {
                let container = Arc::new(container);
                let record = container.record().clone();
                if !record.log_path.as_os_str().is_empty()
                    && let Ok(log) = crate::container::log::LogFile::open(&record.log_path)
                {
                    container.set_log(Some(Arc::new(log)));
                }
                let name = names::container(&record.config, &sandbox.record().config);
                if let Ok(held) = node.registry.reserve(name, container.id.as_str()) {
                    held.keep();
                }
                node.registry.add_container(sandbox.clone(), container);
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "container record does not read; removed");
                let _ = std::fs::remove_file(&path);
            }
        }
    }
    Ok(())
}

fn is_record(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}

/// Machines and networks that no record speaks of.
async fn end_strays(node: &Arc<Node>) {
    let known = node.registry.sandboxes();
    let run_dirs: Vec<_> =
        known.iter().map(|sandbox| vm::run_dir(&node.config.run_dir, &sandbox.id)).collect();
    for path in std::fs::read_dir(node.config.run_dir.join("sandboxes")).into_iter().flatten().flatten() {
        let path = path.path();
        if !run_dirs.contains(&path) {
            tracing::info!(path = %path.display(), "end a machine that no record speaks of");
            let ended = match host::owns(&path) {
                true => host::destroy(&path, None).await.map_err(Error::from),
                false => vm::destroy(&path).await.map_err(Error::from),
            };
            if let Err(error) = ended {
                tracing::warn!(path = %path.display(), %error, "end stray machine");
            }
        }
    }
    let shared: Vec<_> = known.iter().map(|sandbox| Shared::of(&node.config.run_dir, &sandbox.id)).collect();
    for stray in Shared::all(&node.config.run_dir) {
        if !shared.iter().any(|shared| shared.path() == stray.path()) {
            tracing::info!(path = %stray.path().display(), "unmount volumes that no record speaks of");
            if let Err(error) = stray.close() {
                tracing::warn!(path = %stray.path().display(), %error, "unmount stray volumes");
            }
        }
    }
    for id in node.network.recorded().unwrap_or_default() {
        if !known.iter().any(|sandbox| sandbox.id.as_str() == id) {
            tracing::info!(sandbox = id, "give back a network that no record speaks of");
            if let Err(error) = node.network.detach(&id).await {
                tracing::warn!(sandbox = id, %error, "give back stray network");
            }
        }
    }
}
