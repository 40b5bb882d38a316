//! Containers as huskd knows them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use husk_base::id::ContainerId;
use husk_base::record::{self, Durability, ReadError, Unknown};
use husk_base::{lock, now};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::container_record::{ContainerRecord, Exit, State};
use super::cpu_rate::CpuRate;
use super::{fanout, log};

/// One container.
#[derive(Debug)]
pub struct Container {
    /// The container's id.
    pub id: ContainerId,
    /// Held by whichever operation changes it.
    pub op_lock: tokio::sync::Mutex<()>,
    record: Mutex<ContainerRecord>,
    unknown: Unknown,
    path: PathBuf,
    /// The container was removed: nothing of it is written any more. Changes under the
    /// record's lock.
    forgotten: AtomicBool,
    exited: watch::Sender<bool>,
    /// The stop signal was sent.
    pub asked_to_stop: AtomicBool,
    /// How much processor time it takes.
    pub cpu_rate: CpuRate,
    log: Mutex<Option<Arc<log::LogFile>>>,
    /// The output, for those who are attached.
    pub output: fanout::Output,
    /// The way to its input, once somebody attached has used it.
    pub stdin: tokio::sync::Mutex<Option<tokio::net::UnixStream>>,
    tasks: Mutex<JoinSet<()>>,
}

impl Container {
    /// A container about to be made, with its record on disk in the sandbox's
    /// folder.
    ///
    /// # Errors
    /// The disk's.
    pub fn create(sandbox_directory: &std::path::Path, record: ContainerRecord) -> std::io::Result<Self> {
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

    fn with(path: PathBuf, record: ContainerRecord, unknown: Unknown) -> Self {
        let exited = watch::Sender::new(matches!(record.state, State::Exited(_)));
        Self {
            id: record.id.clone(),
            op_lock: tokio::sync::Mutex::default(),
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
            tasks: Mutex::default(),
        }
    }

    /// The record as it is now.
    pub fn record(&self) -> MutexGuard<'_, ContainerRecord> {
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
    pub fn update(&self, change: impl FnOnce(&mut ContainerRecord)) -> std::io::Result<()> {
        let mut record = lock(&self.record);
        let mut next = record.clone();
        change(&mut next);
        self.write(&next, Durability::Acknowledged)?;
        *record = next;
        Ok(())
    }

    /// The caller holds the record's lock.
    fn write(&self, record: &ContainerRecord, durability: Durability) -> std::io::Result<()> {
        if self.forgotten.load(Ordering::Relaxed) {
            return Ok(());
        }
        record::write(&self.path, record, &self.unknown, durability)
    }

    /// Records the end; false when one was recorded before, which stands.
    /// Whoever waits for it goes on with [`Self::announce_exit`].
    pub fn record_exit(&self, mut exit: Exit) -> bool {
        let mut record = lock(&self.record);
        if matches!(record.state, State::Exited(_)) {
            return false;
        }
        // The guest's clock is the guest's word: nothing ends before it has started,
        // or later than now.
        exit.finished_at = exit.finished_at.min(now()).max(record.started_at);
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
    pub fn spawn_task(&self, work: impl Future<Output = ()> + Send + 'static) {
        lock(&self.tasks).spawn(work);
    }

    /// Ends all such work.
    pub fn abort_tasks(&self) {
        lock(&self.tasks).abort_all();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::container_record;

    fn container(folder: &std::path::Path) -> Container {
        std::fs::create_dir(folder.join("containers")).unwrap();
        Container::create(folder, container_record("c", "s")).unwrap()
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
    fn an_end_is_within_the_containers_life_and_a_code_is_one_that_processes_have() {
        let folder = tempfile::tempdir().unwrap();
        let container = container(folder.path());
        let started_at = now();
        container.update(|record| record.started_at = started_at).unwrap();
        assert!(container.record_exit(Exit::reported(-256, false, i64::MAX)));
        let State::Exited(exit) = container.state() else { panic!("it has not exited") };
        assert_eq!((exit.code, exit.reason.as_str()), (255, "Error"));
        assert!((started_at..=now()).contains(&exit.finished_at));

        let other = Container::create(folder.path(), container_record("d", "s")).unwrap();
        other.update(|record| record.started_at = started_at).unwrap();
        assert!(other.record_exit(Exit::reported(0, false, 1)));
        let State::Exited(exit) = other.state() else { panic!("it has not exited") };
        assert_eq!((exit.code, exit.finished_at), (0, started_at));
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
