//! Recovery, when huskd starts: pods that an earlier huskd left are found; those that
//! live are taken over, and those that are half-made or have died are torn down.
//!
//! Sandboxes are looked after side by side, and the start waits for them only so
//! long: a guest that does not answer costs its own pod, and nobody else. It is
//! waited for in the background then, and its pod can be stopped meanwhile.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_backend as backend;
use husk_backend::{Place, RunningPod};
use husk_base::id::{ContainerId, SandboxId};
use husk_base::record::ReadError;
use husk_base::{blocking, chain, dirs};
use husk_config::Handler;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::Instrument;

use super::log::open_log;
use super::pauses::Pauses;
use super::{lifecycle, orphans, remove_container, start_container, supervise, synced_volumes};
use crate::model::sandbox::{CONTAINERS, RECORD};
use crate::model::unread::Unread;
use crate::model::{Container, Phase, Sandbox, SandboxOp, State, Unlocked, names};
use crate::{Error, Node};

/// Most time that the start waits until all sandboxes are looked after.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How many sandboxes are looked after at a time.
const AT_ONCE: usize = 32;

/// How long one of them keeps others waiting.
const TURN: Duration = Duration::from_secs(5);

/// Brings records and reality together. A sandbox that gives trouble is logged
/// and kept as not ready, so that its client can stop and remove it; it never
/// keeps huskd from starting.
///
/// # Errors
/// A folder that cannot be read.
pub async fn recover(node: &Arc<Node>) -> std::io::Result<()> {
    recover_within(node, START_LIMIT).await
}

pub(super) async fn recover_within(node: &Arc<Node>, patience: Duration) -> std::io::Result<()> {
    let found = find(node).await?;
    let registering = node.clone();
    let found = blocking(move || found.register(&registering)).await;
    let sandboxes = found.sandboxes.iter().map(|sandbox| sandbox.id.clone());
    let unread = found.unread.iter().map(|unread| SandboxId::from(unread.id.as_str()));
    let known: Vec<_> = sandboxes.chain(unread).collect();
    orphans::end(node, &known).await;
    for path in found.empty {
        if let Err(error) = lifecycle::remove_tree(&path).await {
            tracing::warn!(path = %path.display(), %error, "failed to remove the folder of a pod that has no record");
        }
    }
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut work = JoinSet::new();
    for sandbox in found.sandboxes {
        let (node, turns) = (node.clone(), turns.clone());
        let span = sandbox.span();
        let recovered = async move {
            if let Err(error) = recover_sandbox(&node, &sandbox).await {
                tracing::warn!(error = chain(&error), "failed to recover a pod");
            }
        };
        work.spawn(in_turn(turns, recovered.instrument(span)));
    }
    if timeout(patience, async { while work.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!(
            sandboxes = work.len(),
            "not all sandboxes are looked after; the rest is in the background"
        );
        work.detach_all();
    }
    // Before the first new pod: its addresses are on nobody's list.
    node.network.collect_garbage().await;
    tokio::spawn(check_networks(node.clone()));
    Ok(())
}

/// Does some work when it is its turn; one that takes long goes on without.
async fn in_turn(turns: Arc<Semaphore>, work: impl Future<Output = ()>) {
    let turn = turns.acquire().await;
    tokio::pin!(work);
    if timeout(TURN, &mut work).await.is_err() {
        drop(turn);
        work.await;
    }
}

/// The contents of the folder of sandboxes.
#[derive(Default)]
struct Found {
    sandboxes: Vec<Arc<Sandbox>>,
    /// Sandboxes whose records do not read. They are left as they are.
    unread: Vec<Unread>,
    /// Folders without a record, of which nothing lives.
    empty: Vec<PathBuf>,
}

impl Found {
    /// Makes the sandboxes known, with their containers. This blocks.
    fn register(self, node: &Node) -> Self {
        for unread in &self.unread {
            unread.tell();
            node.registry.add_unread(unread.clone());
        }
        for sandbox in &self.sandboxes {
            register(node, sandbox);
        }
        self
    }
}

/// An entry of the folder of sandboxes.
enum Entry {
    Sandbox(Sandbox),
    /// A sandbox whose record does not read.
    Unread(Unread),
    /// A folder that has the name of a sandbox, and no record.
    NoRecord(PathBuf, SandboxId),
}

async fn find(node: &Arc<Node>) -> std::io::Result<Found> {
    let reading = node.clone();
    let mut found = Found::default();
    for entry in blocking(move || entries(&reading)).await? {
        match entry {
            Entry::Sandbox(sandbox) => found.sandboxes.push(Arc::new(sandbox)),
            Entry::Unread(unread) => found.unread.push(unread),
            Entry::NoRecord(path, id) => {
                // The record is the first thing written into the folder: nothing else
                // was made, unless somebody has removed it since.
                if Place::anything_lives(&dirs::sandbox_run_dir(&node.config.run_dir, &id)).await {
                    let record = path.join(RECORD);
                    let why = std::io::Error::from(ErrorKind::NotFound).to_string();
                    found.unread.push(Unread::sandbox(id.as_str(), &record, &why));
                } else {
                    tracing::warn!(path = %path.display(), "there is no record of a sandbox: its folder is removed");
                    found.empty.push(path);
                }
            }
        }
    }
    Ok(found)
}

/// Reads the folder of sandboxes, and each sandbox's record. This blocks.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn entries(node: &Node) -> std::io::Result<Vec<Entry>> {
    let folder = node.sandboxes_dir();
    std::fs::create_dir_all(&folder)?;
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !SandboxId::is_one(&name) {
            tracing::warn!(path = %path.display(), "this is no sandbox's, and is left where it is");
            continue;
        }
        entries.push(match Sandbox::load(path.clone(), node.events.clone()) {
            Ok(sandbox) => Entry::Sandbox(sandbox),
            Err(ReadError::File(error)) if error.kind() == ErrorKind::NotFound => {
                Entry::NoRecord(path, SandboxId::from(name.as_str()))
            }
            Err(error) => Entry::Unread(Unread::sandbox(&name, &path.join(RECORD), &error.to_string())),
        });
    }
    Ok(entries)
}

/// Makes a sandbox known, with its containers. One that was never ready has
/// nothing that a client knows.
fn register(node: &Node, sandbox: &Arc<Sandbox>) {
    let record = sandbox.record();
    if record.phase == Phase::Creating {
        return;
    }
    if let Ok(held) = node.registry.reserve(names::sandbox(&record.config), sandbox.id.as_str()) {
        held.keep();
    }
    node.registry.add_sandbox(sandbox.clone());
    if let Err(error) = load_containers(node, sandbox) {
        let unread = Unread::containers(&sandbox.id, &sandbox.directory().join(CONTAINERS), &error);
        unread.tell();
        node.registry.add_unread(unread);
    }
}

/// Says which pods are no longer connected as they were. Nobody waits for it.
async fn check_networks(node: Arc<Node>) {
    for sandbox in node.registry.sandboxes() {
        if sandbox.record().phase == Phase::Ready
            && let Err(error) = node.network.check(sandbox.id.as_str()).await
        {
            let error = chain(&error);
            tracing::warn!(sandbox = %sandbox.id, error, "the pod's network is not as it was");
        }
    }
}

async fn recover_sandbox(node: &Arc<Node>, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    let phase = sandbox.record().phase;
    if phase == Phase::Ready {
        return take_over(node, sandbox).await;
    }
    let mut unlocked = Unlocked::new();
    let op = sandbox.lock_op(&mut unlocked).await;
    if phase == Phase::Creating {
        tracing::info!("tearing down a pod that was never ready");
        return lifecycle::undo(node, &op).await.inspect_err(|_| lifecycle::undo_later(node, sandbox));
    }
    // An earlier huskd may have ended before its stop did. When it did not,
    // there is nothing left to do.
    lifecycle::stop(node, &op).await
}

/// Takes over a sandbox whose machine should run, or stops it when the machine
/// has gone.
async fn take_over(node: &Arc<Node>, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    let reached = reach(node, sandbox).await;
    let mut unlocked = Unlocked::new();
    let op = sandbox.lock_op(&mut unlocked).await;
    if sandbox.record().phase != Phase::Ready {
        // A client has stopped it meanwhile.
        return Ok(());
    }
    let running = match reached {
        Ok(running) => Arc::new(running),
        Err(error) => {
            let oom_kills = sandbox.record().oom_kills;
            let ending = sandbox.place(&node.config.run_dir).ending(&error, oom_kills).await;
            tracing::warn!(problem = ending.problem, "the pod has gone");
            return lifecycle::stop_for(node, &op, &ending).await;
        }
    };
    sandbox.set_running(Some(running.clone()));
    lifecycle::watch(sandbox, &running);
    let containers = sandbox.containers();
    let resumed = containers
        .iter()
        .map(|container| resume(node, &op, &running, container).instrument(container.span()));
    futures::future::join_all(resumed).await;
    tracing::info!("took over a running pod");
    Ok(())
}

/// Connects to a pod that should run. One that lives and does not answer is asked
/// again, for ever: that it is silent is no reason to end it.
async fn reach(node: &Node, sandbox: &Arc<Sandbox>) -> Result<RunningPod, backend::Error> {
    let place = sandbox.place(&node.config.run_dir);
    // Without a control group there is no host pod to reach.
    place.host_pod()?;
    let mut pauses = Pauses::new();
    loop {
        let reached = try_to_reach(node, sandbox, &place).await;
        // A client may have stopped it meanwhile.
        let wanted = sandbox.record().phase == Phase::Ready;
        match reached {
            Err(error) if place.lives().await && wanted => {
                let error = chain(&error);
                tracing::warn!(error, "a pod that lives does not answer; asking again");
                sandbox.set_unreached(Some(error));
                pauses.wait().await;
            }
            done => {
                sandbox.set_unreached(None);
                return done;
            }
        }
    }
}

/// Connects to a pod, once.
async fn try_to_reach(node: &Node, sandbox: &Sandbox, place: &Place) -> Result<RunningPod, backend::Error> {
    let record = sandbox.record();
    // Pods live on when the configuration has no such handler any more, or one of the other kind.
    let default = Handler::default_of(record.kind);
    let found = node.config.handler(&record.handler).map(|(_, handler)| handler);
    let handler = found.filter(|handler| handler.kind() == record.kind).unwrap_or(&default);
    let image_slots = record.image_slots.or(handler.vm().map(|vm| vm.image_slots)).unwrap_or_default();
    let limit = handler.agent_timeout();
    let containers = sandbox.containers();
    let used = containers.iter().flat_map(|container| {
        let disks: Vec<_> = container.record().disks().collect();
        disks.into_iter().map(|(slot, rootfs)| (container.id.clone(), slot, rootfs))
    });
    let unread = node.registry.unread_of(&sandbox.id).into_iter().flat_map(|unread| {
        let id = ContainerId::from(unread.id.as_str());
        let disks = unread.disks.unwrap_or_default();
        disks.into_iter().map(move |(slot, rootfs)| (id.clone(), slot, rootfs))
    });
    place.reattach(image_slots, used.chain(unread), limit).await
}

/// Goes on with a container where an earlier huskd left it. What goes wrong
/// concerns no other.
async fn resume(
    node: &Arc<Node>,
    sandbox: &SandboxOp<'_>,
    running: &Arc<RunningPod>,
    container: &Arc<Container>,
) {
    match container.record().state {
        State::Creating => {
            if let Err(error) = remove_container::tear_down(node, sandbox, container).await {
                tracing::warn!(
                    error = chain(&error),
                    "failed to tear down a container that was never made; trying again"
                );
                remove_container::retry_tear_down(node, sandbox, container);
            }
        }
        // The program cannot be started, and the agent knows nothing of the container.
        State::Created if !container.record().start_error.is_empty() => {}
        State::Created | State::Running => {
            if let Err(error) = open_log(sandbox, container).await {
                tracing::warn!(
                    error = chain(&error),
                    "failed to open a container's log; output is lost from here on"
                );
            }
            supervise::resume(sandbox, running, container).await;
            synced_volumes::follow(running, container);
            if container.record().state == State::Running {
                start_container::catch_up(sandbox, running, container).await;
            }
        }
        State::Exited(_) => {}
    }
}

#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn load_containers(node: &Node, sandbox: &Arc<Sandbox>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(sandbox.directory().join(CONTAINERS))? {
        let path = entry?.path();
        if !is_record(&path) {
            continue;
        }
        match Container::load(path.clone()) {
            Ok(container) => {
                let container = Arc::new(container);
                let name = names::container(&container.record().config, &sandbox.record().config);
                if let Ok(held) = node.registry.reserve(name, container.id.as_str()) {
                    held.keep();
                }
                node.registry.add_container(sandbox.clone(), container);
            }
            Err(error) => {
                let id = path.file_stem().unwrap_or_default().to_string_lossy();
                let pod = &sandbox.record().config;
                let unread = Unread::container(&id, (&sandbox.id, pod), &path, &error);
                unread.tell();
                node.registry.add_unread(unread);
            }
        }
    }
    Ok(())
}

fn is_record(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}
