//! Pod sandboxes as huskd knows them: their records on disk, the machine that
//! runs each, and the containers inside.
//!
//! A record is written before the step that it is needed to undo, so a daemon
//! that starts after a crash finds everything that may exist.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use husk_proto::cri;
use serde::{Deserialize, Serialize};

use crate::config::Kind;
use crate::container::{Container, Exit, State, now};
use crate::cpu_rate::CpuRate;
use crate::events::{Event, EventKind, Events};
use crate::id::SandboxId;
use crate::storage::volumes::Volume;
use crate::vm::Machine;

mod clock;
pub mod cpus;
pub mod lifecycle;
pub mod oom_score;
pub mod recover;
pub mod registry;
mod strays;
#[cfg(test)]
pub(crate) mod tests;
pub mod unread;

pub use husk_base::lock;
use husk_base::record::{self, Durability, ReadError, Unknown};

/// What is kept of a sandbox on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: SandboxId,
    /// What the client asked for.
    pub config: cri::PodSandboxConfig,
    /// Name of its runtime handler, never empty.
    pub handler: String,
    /// What it lives in, whatever the handler of that name may be later.
    #[serde(default)]
    pub kind: Kind,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// How far it is.
    pub phase: Phase,
    /// The pod's addresses, the first one first.
    pub ips: Vec<String>,
    /// The pod's network namespace.
    pub netns: PathBuf,
    /// Process id of its VMM, or of its supervisor on the host, for people; nothing is ever done to a process by
    /// this number.
    pub vmm_pid: u32,
    /// The control group of its VMM, or of all processes of a host pod.
    pub cgroup: Option<PathBuf>,
    /// How many processes the kernel had killed in that group for want of memory
    /// when the pod became ready.
    #[serde(default)]
    pub oom_kills: u64,
    /// What its machine was made with.
    #[serde(default)]
    pub size: Option<Size>,
    /// How many slots for images its machine was made with.
    #[serde(default)]
    pub image_slots: Option<u8>,
    /// How long each step of its start took.
    pub boot: BootTimes,
    /// Why it is not ready, if something went wrong.
    pub problem: String,
}

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
}

/// How far a sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Being made; not shown to clients. After a crash it is taken apart.
    Creating,
    /// Its machine runs.
    Ready,
    /// Stopped, or its machine has ended.
    NotReady,
}

/// Milliseconds of each step from request to ready.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct BootTimes {
    /// Network namespace, CNI and tap.
    pub network: u64,
    /// Start of the VMM's process to the first entry into the guest.
    pub vmm: u64,
    /// From there to the agent's first word.
    pub kernel: u64,
    /// From there to an open connection.
    pub agent: u64,
    /// The agent's work on the sandbox.
    pub configure: u64,
    /// Everything.
    pub total: u64,
}

/// Which releases the programs of a pod are of, as far as they have said it. They
/// may be older than this huskd, or newer: see ADR 9.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Versions {
    /// The VMM's; none for a host pod.
    pub vmm: Option<Version>,
    /// The agent's.
    pub agent: Option<Version>,
}

/// The version of one program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Version {
    /// Of what it speaks with huskd; 0 before there were versions.
    pub protocol: u32,
    /// Its release; empty before it was told.
    pub release: String,
}

/// One sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// Held by whichever verb changes the sandbox or its set of containers.
    pub verb: tokio::sync::Mutex<()>,
    events: Events,
    record: Mutex<Record>,
    unknown: Unknown,
    machine: Mutex<Option<Arc<Machine>>>,
    unreached: Mutex<Option<String>>,
    versions: Mutex<Versions>,
    /// How much processor time it takes.
    pub cpu_rate: CpuRate,
    containers: Mutex<Vec<Arc<Container>>>,
    directory: PathBuf,
}

/// The name of the file with the record.
const RECORD: &str = "sandbox.json";

impl Sandbox {
    /// A sandbox about to be made, with its record on disk in `directory`.
    ///
    /// # Errors
    /// The disk's.
    pub fn create(directory: PathBuf, record: Record, events: Events) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory.join("containers"))?;
        let sandbox = Self::with(directory, record, Unknown::default(), events);
        // Nobody was promised anything yet.
        sandbox.write(&sandbox.record(), Durability::Whole)?;
        Ok(sandbox)
    }

    /// The sandbox whose record is in `directory`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn load(directory: PathBuf, events: Events) -> Result<Self, ReadError> {
        let (record, unknown) = record::read(&directory.join(RECORD))?;
        Ok(Self::with(directory, record, unknown, events))
    }

    fn with(directory: PathBuf, record: Record, unknown: Unknown, events: Events) -> Self {
        Self {
            id: record.id.clone(),
            verb: tokio::sync::Mutex::default(),
            events,
            record: Mutex::new(record),
            unknown,
            machine: Mutex::default(),
            unreached: Mutex::default(),
            versions: Mutex::default(),
            cpu_rate: CpuRate::default(),
            containers: Mutex::default(),
            directory,
        }
    }

    /// What is known of it now.
    pub fn record(&self) -> MutexGuard<'_, Record> {
        lock(&self.record)
    }

    /// Changes the record, on disk first, so that a power cut does not undo it.
    ///
    /// # Errors
    /// The disk's; the record is then unchanged.
    pub fn update(&self, change: impl FnOnce(&mut Record)) -> std::io::Result<()> {
        let mut record = lock(&self.record);
        let mut next = record.clone();
        change(&mut next);
        self.write(&next, Durability::Acknowledged)?;
        *record = next;
        Ok(())
    }

    fn write(&self, record: &Record, durability: Durability) -> std::io::Result<()> {
        record::write(&self.directory.join(RECORD), record, &self.unknown, durability)?;
        match self.directory.parent() {
            // The sandbox's folder is in there since it was created.
            Some(folder) if durability == Durability::Acknowledged => std::fs::File::open(folder)?.sync_all(),
            _ => Ok(()),
        }
    }

    /// Changes the record by what is true whether or not it can be written: a
    /// full disk keeps no machine alive. A daemon that starts again compares the
    /// record with what it finds.
    pub fn note(&self, change: impl FnOnce(&mut Record)) {
        let mut record = lock(&self.record);
        change(&mut record);
        if let Err(error) = self.write(&record, Durability::Whole) {
            tracing::warn!(sandbox = %self.id, %error, "write sandbox record");
        }
    }

    /// Its machine, while it runs.
    pub fn machine(&self) -> Option<Arc<Machine>> {
        lock(&self.machine).clone()
    }

    /// Says which machine runs it, or that none does any more.
    pub fn set_machine(&self, machine: Option<Arc<Machine>>) -> Option<Arc<Machine>> {
        std::mem::replace(&mut lock(&self.machine), machine)
    }

    /// Why this huskd cannot reach the machine that runs it, while that is so: it
    /// lives, and has not answered since huskd started.
    pub fn unreached(&self) -> Option<String> {
        lock(&self.unreached).clone()
    }

    /// Says why it cannot be reached, or that it can.
    pub fn set_unreached(&self, why: Option<String>) {
        *lock(&self.unreached) = why;
    }

    /// Which releases its programs are of.
    pub fn versions(&self) -> Versions {
        lock(&self.versions).clone()
    }

    /// Says which releases its programs are of.
    pub fn set_versions(&self, versions: Versions) {
        *lock(&self.versions) = versions;
    }

    /// Its containers.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).clone()
    }

    /// Adds one.
    pub fn add_container(&self, container: Arc<Container>) {
        lock(&self.containers).push(container);
    }

    /// Takes one away.
    pub fn drop_container(&self, container: &Container) {
        lock(&self.containers).retain(|other| other.id != container.id);
    }

    /// Sends the event that something happened to the container `id`, or to the
    /// sandbox itself, with how the sandbox and its containers are now.
    pub fn send_event(&self, id: &str, kind: EventKind) {
        self.events.send(|| {
            let containers = self.containers().into_iter().map(|container| container.record().clone());
            Event {
                id: id.to_owned(),
                kind,
                at: now(),
                sandbox: self.record().clone(),
                containers: containers.filter(|record| record.state != State::Creating).collect(),
            }
        });
    }

    /// Records a container's end, and sends the event of it if it was the first
    /// to be told. Who waits for the container goes on after that.
    pub fn container_ended(&self, container: &Container, exit: Exit) {
        if container.record_exit(exit) {
            self.send_event(container.id.as_str(), EventKind::Stopped);
        }
        container.announce_exit();
    }

    /// What its containers have of the host's files.
    pub fn volumes(&self) -> Vec<Volume> {
        self.containers().iter().flat_map(|container| container.record().volumes.clone()).collect()
    }

    /// Its folder under the state directory.
    pub fn directory(&self) -> &Path {
        &self.directory
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
