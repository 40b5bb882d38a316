//! Pod sandboxes as huskd knows them: their records on disk, what runs of each,
//! and the containers inside.
//!
//! A record is written before the step that it is needed to undo, so a daemon
//! that starts after a crash finds everything that may exist.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use husk_backend::{Place, RunningPod};
use husk_base::id::SandboxId;
use husk_base::record::{Durability, ReadError};
use husk_base::{FileError, chain, lock, now};
use husk_volumes::Volume;
use serde::Serialize;
use tracing::Span;

use super::container::Container;
use super::container_record::{Exit, State};
use super::cpu_rate::CpuRate;
use super::events::{Event, EventKind, Events};
use super::op::{BeforeSandbox, SandboxOp};
use super::sandbox_record::SandboxRecord;
use super::stored::Stored;
use crate::lane::Lane;
use crate::span;

/// Releases that the programs of a pod are of, as far as they have said it. They
/// may be older than this huskd, or newer: see ADR 9.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Versions {
    /// The VMM's version; none for a host pod.
    pub vmm: Option<Version>,
    /// The version of the pod's agent.
    pub agent: Option<Version>,
}

/// The version of one program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Version {
    /// The version of what it speaks with huskd; 0 before there were versions.
    pub protocol: u32,
    /// The program's release; empty before it was told.
    pub release: String,
}

/// A pod sandbox of the node.
#[derive(Debug)]
pub struct Sandbox {
    /// The sandbox's id.
    pub id: SandboxId,
    op_lock: tokio::sync::Mutex<()>,
    events: Events,
    record: Stored<SandboxRecord>,
    running: Mutex<Option<Arc<RunningPod>>>,
    unreached: Mutex<Option<String>>,
    versions: Mutex<Versions>,
    /// The pod's file calls on paths that the client names.
    pub(crate) lane: Lane,
    /// How much processor time the pod takes.
    pub cpu_rate: CpuRate,
    containers: Mutex<Vec<Arc<Container>>>,
    directory: PathBuf,
}

/// The name of the file with the record.
pub(crate) const RECORD: &str = "sandbox.json";

/// The name of the folder with the records of its containers.
pub(crate) const CONTAINERS: &str = "containers";

impl Sandbox {
    /// A sandbox about to be made, with its record on disk in `directory`.
    ///
    /// # Errors
    /// The disk refuses it.
    pub async fn create(
        directory: PathBuf,
        record: SandboxRecord,
        events: Events,
    ) -> Result<Self, FileError> {
        let containers = directory.join(CONTAINERS);
        let made = tokio::fs::create_dir_all(&containers).await;
        made.map_err(FileError::at("make folder", &containers))?;
        let record = Stored::create(directory.join(RECORD), directory.parent(), record).await?;
        Ok(Self::with(directory, record, events))
    }

    /// The sandbox whose record is in `directory`, which is read at once: this blocks.
    ///
    /// # Errors
    /// The record cannot be used, see [`ReadError`].
    pub fn load(directory: PathBuf, events: Events) -> Result<Self, ReadError> {
        let record = Stored::load(directory.join(RECORD), directory.parent())?;
        Ok(Self::with(directory, record, events))
    }

    fn with(directory: PathBuf, record: Stored<SandboxRecord>, events: Events) -> Self {
        Self {
            id: record.get().id.clone(),
            op_lock: tokio::sync::Mutex::default(),
            events,
            record,
            running: Mutex::default(),
            unreached: Mutex::default(),
            versions: Mutex::default(),
            lane: Lane::default(),
            cpu_rate: CpuRate::default(),
            containers: Mutex::default(),
            directory,
        }
    }

    /// Waits for the pod's lock, for an operation that changes the pod or its set of
    /// containers. The operation may hold the lock of a container already.
    pub(crate) async fn lock_op<'a>(self: &'a Arc<Self>, _: &'a mut impl BeforeSandbox) -> SandboxOp<'a> {
        SandboxOp::new(self, self.op_lock.lock().await)
    }

    /// The record as it is now.
    pub fn record(&self) -> Arc<SandboxRecord> {
        self.record.get()
    }

    /// Changes the record, on disk first, so that a power cut does not undo it.
    ///
    /// # Errors
    /// The disk refuses it; the record is then unchanged.
    pub async fn update(&self, change: impl FnOnce(&mut SandboxRecord)) -> Result<(), FileError> {
        let mut next = self.record.change().await;
        change(&mut next);
        next.commit(Durability::Acknowledged).await
    }

    /// Changes the record by what is true whether or not it can be written.
    pub async fn update_best_effort(&self, change: impl FnOnce(&mut SandboxRecord)) {
        let mut next = self.record.change().await;
        change(&mut next);
        let (written, _unsettled) = next.commit_anyway().await;
        if let Err(error) = written {
            tracing::warn!(error = chain(&error), "failed to write the record of a pod");
        }
    }

    /// The pod, while it runs.
    pub fn running(&self) -> Option<Arc<RunningPod>> {
        lock(&self.running).clone()
    }

    /// Says that the pod runs, or does not run any more; answers what it was before.
    pub fn set_running(&self, running: Option<Arc<RunningPod>>) -> Option<Arc<RunningPod>> {
        std::mem::replace(&mut lock(&self.running), running)
    }

    /// Where the pod is on its node; `run_dir` is huskd's.
    pub fn place(&self, run_dir: &Path) -> Place {
        let record = self.record();
        Place::new(run_dir, self.id.clone(), record.kind, record.cgroup.clone())
    }

    /// The reason for which this huskd cannot reach the pod, while that is so: the pod
    /// lives, and has not answered since huskd started.
    pub fn unreached(&self) -> Option<String> {
        lock(&self.unreached).clone()
    }

    /// Notes the reason for which the pod cannot be reached; `None` if it can.
    pub fn set_unreached(&self, why: Option<String>) {
        *lock(&self.unreached) = why;
    }

    /// The releases that the pod's programs are of.
    pub fn versions(&self) -> Versions {
        lock(&self.versions).clone()
    }

    /// Notes which releases the pod's programs are of.
    pub fn set_versions(&self, versions: Versions) {
        *lock(&self.versions) = versions;
    }

    /// The containers in the pod.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).clone()
    }

    /// Adds a container to the pod.
    pub fn add_container(&self, container: Arc<Container>) {
        lock(&self.containers).push(container);
    }

    /// Takes a container from the pod.
    pub fn drop_container(&self, container: &Container) {
        lock(&self.containers).retain(|other| other.id != container.id);
    }

    /// Sends the event that something happened to the container `id`, or to the
    /// sandbox itself, with how the sandbox and its containers are now.
    pub fn send_event(&self, id: &str, kind: EventKind) {
        self.events.send(|| {
            let containers = self.containers().into_iter().map(|container| container.record());
            Event {
                id: id.to_owned(),
                kind,
                at: now(),
                sandbox: self.record(),
                containers: containers.filter(|record| record.state != State::Creating).collect(),
            }
        });
    }

    /// Records a container's end, and sends the event of it if it was the first
    /// to be told. Who waits for the container goes on after that.
    pub async fn container_ended(&self, container: &Container, exit: Exit) {
        container.record_exit(exit, || self.send_event(container.id.as_str(), EventKind::Stopped)).await;
    }

    /// The volumes of all containers of the pod.
    pub fn volumes(&self) -> Vec<Volume> {
        self.containers().iter().flat_map(|container| container.record().volumes.clone()).collect()
    }

    /// The sandbox's folder under the state directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The span of a task that works for the pod.
    pub(crate) fn span(&self) -> Span {
        span::sandbox(&self.id)
    }

    /// The folder of the writable layers of a host pod.
    pub fn layers(&self) -> PathBuf {
        self.directory.join("layers")
    }

    /// The file behind the machine's writable disk.
    pub fn scratch(&self) -> PathBuf {
        self.directory.join("scratch.ext4")
    }
}
