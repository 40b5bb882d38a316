//! Containers as huskd knows them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use husk_base::record::{self, Durability, ReadError, Unknown};
use husk_proto::cri;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::cpu_rate::CpuRate;
use crate::id::{ContainerId, SandboxId};
use crate::sandbox::lock;
use crate::storage::image_volumes::ImageVolume;
use crate::storage::volumes::Volume;

mod capture;
pub mod fanout;
pub mod log;
pub mod spec;
pub mod supervise;

/// What is kept of a container on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: ContainerId,
    /// Its pod.
    pub sandbox_id: SandboxId,
    /// What the client asked for.
    pub config: cri::ContainerConfig,
    /// Id of the image.
    pub image_id: String,
    /// A tag of the image, for people; empty if it had none.
    #[serde(default)]
    pub image_tag: String,
    /// What the image is to be called in answers: a digest reference if there is one.
    pub image_ref: String,
    /// Serial number of the block device that holds the image in the guest.
    pub image_slot: String,
    /// The file behind that device.
    pub image_rootfs: PathBuf,
    /// The images that are volumes of it.
    #[serde(default)]
    pub image_volumes: Vec<ImageVolume>,
    /// What it has of the host's files.
    #[serde(default)]
    pub volumes: Vec<Volume>,
    /// Where its log goes; empty for nowhere.
    pub log_path: PathBuf,
    /// The signal that asks it to stop.
    pub stop_signal: i32,
    /// Process id of its first process in the guest; 0 before it has one.
    pub guest_pid: u32,
    /// Nanoseconds since 1970, 0 while it has not happened.
    pub created_at: i64,
    /// The same.
    pub started_at: i64,
    /// Who its first process runs as, by numbers; `None` before it has one.
    #[serde(default)]
    pub user: Option<cri::LinuxContainerUser>,
    /// Why its program cannot be started, if that is known already; there is no
    /// such container in the guest then.
    #[serde(default)]
    pub start_error: String,
    /// It has hooks that run once it has been deleted.
    #[serde(default)]
    pub poststop: bool,
    /// Where it is in its life.
    pub state: State,
}

impl Record {
    /// The disks of the images that it uses, and the files behind them.
    pub fn disks(&self) -> impl Iterator<Item = (String, PathBuf)> {
        let volumes = self.image_volumes.iter().map(|volume| (volume.slot.clone(), volume.rootfs.clone()));
        std::iter::once((self.image_slot.clone(), self.image_rootfs.clone())).chain(volumes)
    }
}

/// Where a container is in its life. It only ever moves down this list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Being made; not shown to clients. After a crash it is taken apart.
    Creating,
    /// Made, not started.
    Created,
    /// Started.
    Running,
    /// Ended.
    Exited(Exit),
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 to 255.
    pub code: i32,
    /// Nanoseconds since 1970.
    pub finished_at: i64,
    /// "Completed", "Error", "OOMKilled", or what happened to the machine.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Exit {
    /// The end of a process that the agent reported.
    #[must_use]
    pub fn reported(code: i32, oom_killed: bool, finished_at: i64) -> Self {
        let reason = match (oom_killed, code) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        };
        Self { code, finished_at, reason: reason.into(), message: String::new() }
    }

    /// An end of which nobody can say any more how it was: never a success.
    #[must_use]
    pub fn unknown(message: &str) -> Self {
        Self { code: 255, finished_at: now(), reason: "Unknown".into(), message: message.into() }
    }

    /// The end of everything in a machine that the node's kernel killed for want of
    /// memory.
    #[must_use]
    pub fn out_of_memory(message: &str) -> Self {
        let code = 128 + libc::SIGKILL;
        Self { code, finished_at: now(), reason: "OOMKilled".into(), message: message.into() }
    }

    /// The end of everything in a machine that has gone: never a success.
    #[must_use]
    pub fn machine_gone(message: &str) -> Self {
        Self { code: 255, finished_at: now(), reason: "SandboxTerminated".into(), message: message.into() }
    }
}

impl State {
    /// The state as CRI counts it.
    #[must_use]
    pub const fn cri(&self) -> cri::ContainerState {
        match self {
            Self::Creating => cri::ContainerState::ContainerUnknown,
            Self::Created => cri::ContainerState::ContainerCreated,
            Self::Running => cri::ContainerState::ContainerRunning,
            Self::Exited(_) => cri::ContainerState::ContainerExited,
        }
    }

    /// In a word, for error messages.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Running => "running",
            Self::Exited(_) => "exited",
        }
    }
}

/// One container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// Held by whichever verb changes it.
    pub verb: tokio::sync::Mutex<()>,
    record: Mutex<Record>,
    unknown: Unknown,
    path: PathBuf,
    /// It was removed: nothing of it is written any more. Changes under the
    /// record's lock.
    forgotten: AtomicBool,
    exited: watch::Sender<bool>,
    /// It has got its stop signal.
    pub asked_to_stop: AtomicBool,
    /// How much processor time it takes.
    pub cpu_rate: CpuRate,
    log: Mutex<Option<Arc<log::LogFile>>>,
    /// Its output, for those who are attached.
    pub output: fanout::Output,
    /// The way to its input, once somebody attached has used it.
    pub stdin: tokio::sync::Mutex<Option<tokio::net::UnixStream>>,
    attendants: Mutex<JoinSet<()>>,
}

impl Container {
    /// A container about to be made, with its record on disk in the sandbox's
    /// folder.
    ///
    /// # Errors
    /// The disk's.
    pub fn create(sandbox_directory: &std::path::Path, record: Record) -> std::io::Result<Self> {
        let path = sandbox_directory.join("containers").join(format!("{}.json", record.id));
        // Nobody was promised anything yet.
        record::write(&path, &record, &Unknown::default(), Durability::Whole)?;
        Ok(Self::with(path, record, Unknown::default()))
    }

    /// The container whose record is the file `path`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn load(path: PathBuf) -> Result<Self, ReadError> {
        let (record, unknown) = record::read(&path)?;
        Ok(Self::with(path, record, unknown))
    }

    fn with(path: PathBuf, record: Record, unknown: Unknown) -> Self {
        let exited = watch::Sender::new(matches!(record.state, State::Exited(_)));
        Self {
            id: record.id.clone(),
            verb: tokio::sync::Mutex::default(),
            record: Mutex::new(record),
            unknown,
            path,
            forgotten: AtomicBool::new(false),
            exited,
            asked_to_stop: AtomicBool::new(false),
            cpu_rate: CpuRate::default(),
            log: Mutex::default(),
            output: fanout::Output::default(),
            stdin: tokio::sync::Mutex::default(),
            attendants: Mutex::default(),
        }
    }

    /// What is known of it now.
    pub fn record(&self) -> MutexGuard<'_, Record> {
        lock(&self.record)
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        self.record().state.clone()
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

    /// The caller holds the record's lock.
    fn write(&self, record: &Record, durability: Durability) -> std::io::Result<()> {
        if self.forgotten.load(Ordering::Relaxed) {
            return Ok(());
        }
        record::write(&self.path, record, &self.unknown, durability)
    }

    /// Records the end; false when one was recorded before, which stands.
    /// Whoever waits for it goes on with [`Self::announce_exit`].
    pub fn record_exit(&self, exit: Exit) -> bool {
        let mut record = lock(&self.record);
        if matches!(record.state, State::Exited(_)) {
            return false;
        }
        record.state = State::Exited(exit);
        // The end is true whether or not it could be written; a daemon that
        // starts again asks the agent, or finds the machine gone.
        if let Err(error) = self.write(&record, Durability::Whole) {
            tracing::warn!(container = %self.id, %error, "write container record");
        }
        true
    }

    /// Lets those go on who wait for the end.
    pub fn announce_exit(&self) {
        self.exited.send_replace(true);
    }

    /// Returns once it has exited.
    pub async fn wait_exited(&self) {
        // The sender lives in `self`, so this cannot fail.
        let _ = self.exited.subscribe().wait_for(|exited| *exited).await;
    }

    /// The open log, if it has one.
    pub fn log(&self) -> Option<Arc<log::LogFile>> {
        lock(&self.log).clone()
    }

    /// Says which log its output goes to.
    pub fn set_log(&self, file: Option<Arc<log::LogFile>>) {
        *lock(&self.log) = file;
    }

    /// Runs `work` for as long as the container is known.
    pub fn attend(&self, work: impl Future<Output = ()> + Send + 'static) {
        lock(&self.attendants).spawn(work);
    }

    /// Ends all such work.
    pub fn dismiss(&self) {
        lock(&self.attendants).abort_all();
    }

    /// Removes the record from disk, for good: an end that is told later does
    /// not bring it back.
    ///
    /// # Errors
    /// The disk's; a record that is gone is no error.
    pub fn forget(&self) -> std::io::Result<()> {
        let _record = lock(&self.record);
        self.forgotten.store(true, Ordering::Relaxed);
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Nanoseconds since 1970.
#[must_use]
pub fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|elapsed| i64::try_from(elapsed.as_nanos()).ok())
        .unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Of a container that runs.
    pub(crate) fn record(id: &str, sandbox: &str) -> Record {
        Record {
            id: ContainerId::from(id),
            sandbox_id: SandboxId::from(sandbox),
            config: cri::ContainerConfig::default(),
            image_id: String::new(),
            image_tag: String::new(),
            image_ref: String::new(),
            image_slot: String::new(),
            image_rootfs: PathBuf::new(),
            image_volumes: Vec::new(),
            volumes: Vec::new(),
            log_path: PathBuf::new(),
            stop_signal: 15,
            guest_pid: 1,
            created_at: 1,
            started_at: 2,
            user: None,
            start_error: String::new(),
            poststop: false,
            state: State::Running,
        }
    }

    fn container(folder: &std::path::Path) -> Container {
        std::fs::create_dir(folder.join("containers")).unwrap();
        Container::create(folder, record("c", "s")).unwrap()
    }

    #[test]
    fn the_first_end_stands_and_is_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let container = container(folder.path());
        assert!(container.record_exit(Exit::reported(3, false, 9)));
        assert!(!container.record_exit(Exit::machine_gone("later")));
        let loaded = Container::load(folder.path().join("containers/c.json")).unwrap();
        assert_eq!(loaded.state(), State::Exited(Exit::reported(3, false, 9)));
    }

    #[test]
    fn an_end_after_the_removal_brings_no_record_back() {
        let folder = tempfile::tempdir().unwrap();
        let container = container(folder.path());
        container.forget().unwrap();
        assert!(container.record_exit(Exit::reported(0, false, 9)));
        container.update(|record| record.guest_pid = 2).unwrap();
        assert!(!folder.path().join("containers/c.json").exists());
    }
}
