//! Containers as huskd knows them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use husk_base::id::ContainerId;
use husk_base::record::{Durability, ReadError};
use husk_base::{FileError, blocking, chain, lock, now};
use tokio::task::JoinSet;
use tracing::{Instrument, Span};

use super::container_record::{ContainerRecord, Exit, State};
use super::cpu_rate::CpuRate;
use super::op::{ContainerOp, ContainerTurn, Unlocked};
use super::sandbox::CONTAINERS;
use super::stored::Stored;
use super::{fanout, log};
use crate::span;

/// The end of the name of the file beside a record that says how much is in the log.
const POSITION: &str = "position";

/// A container of the node.
#[derive(Debug)]
pub struct Container {
    /// The container's id.
    pub id: ContainerId,
    op_lock: tokio::sync::Mutex<ContainerTurn>,
    record: Stored<ContainerRecord>,
    position: PathBuf,
    /// How much processor time the container takes.
    pub cpu_rate: CpuRate,
    log: Mutex<Option<Arc<log::LogFile>>>,
    /// The output, for clients that are attached.
    pub output: fanout::Output,
    /// The way to the container's input, once somebody attached has used it.
    pub stdin: tokio::sync::Mutex<Option<tokio::net::UnixStream>>,
    tasks: Mutex<JoinSet<()>>,
}

impl Container {
    /// A container about to be made, with its record on disk in the sandbox's
    /// folder.
    ///
    /// # Errors
    /// The disk refuses it.
    pub async fn create(sandbox_directory: &Path, record: ContainerRecord) -> Result<Self, FileError> {
        let path = sandbox_directory.join(CONTAINERS).join(format!("{}.json", record.id));
        let position = path.with_extension(POSITION);
        Ok(Self::with(Stored::create(path, None, record).await?, position))
    }

    /// The container whose record is the file `path`, which is read at once: this
    /// blocks.
    ///
    /// # Errors
    /// The record cannot be used, see [`ReadError`].
    pub fn load(path: PathBuf) -> Result<Self, ReadError> {
        let position = path.with_extension(POSITION);
        Ok(Self::with(Stored::load(path, None)?, position))
    }

    fn with(record: Stored<ContainerRecord>, position: PathBuf) -> Self {
        Self {
            id: record.get().id.clone(),
            position,
            op_lock: tokio::sync::Mutex::default(),
            record,
            cpu_rate: CpuRate::default(),
            log: Mutex::default(),
            output: fanout::Output::default(),
            stdin: tokio::sync::Mutex::default(),
            tasks: Mutex::default(),
        }
    }

    /// Waits for the container's lock, for an operation that changes the container.
    pub(crate) async fn lock_op<'a>(self: &'a Arc<Self>, _: &'a mut Unlocked) -> ContainerOp<'a> {
        ContainerOp::new(self, self.op_lock.lock().await)
    }

    /// The record as it is now.
    pub fn record(&self) -> Arc<ContainerRecord> {
        self.record.get()
    }

    /// Changes the record, on disk first, so that a power cut does not undo it.
    ///
    /// # Errors
    /// The disk refuses it; the record is then unchanged.
    pub async fn update(&self, change: impl FnOnce(&mut ContainerRecord)) -> Result<(), FileError> {
        let mut next = self.record.change().await;
        change(&mut next);
        next.commit(Durability::Acknowledged).await
    }

    /// Records the end, and then calls `tell`, before anybody who waits for the end goes
    /// on. False when an end was recorded before, which stands.
    pub async fn record_exit(&self, mut exit: Exit, tell: impl FnOnce()) -> bool {
        let mut next = self.record.change().await;
        if matches!(next.state, State::Exited(_)) {
            return false;
        }
        // The guest's clock is the guest's word: nothing ends before it has started,
        // or later than now.
        exit.finished_at = exit.finished_at.min(now()).max(next.started_at);
        next.state = State::Exited(exit);
        // A huskd that starts again asks the agent, or finds the machine gone.
        let (written, _unsettled) = next.commit_anyway().await;
        if let Err(error) = written {
            tracing::warn!(container = %self.id, error = chain(&error), "failed to write the record of a container");
        }
        tell();
        true
    }

    /// Returns once the container has exited, and those who listen were told.
    pub async fn wait_exited(&self) {
        self.record.wait_for(|record| matches!(record.state, State::Exited(_))).await;
        self.record.settled().await;
    }

    /// The file that says how much of its output is in its log, beside its record.
    pub(crate) fn position_path(&self) -> &Path {
        &self.position
    }

    /// The open log, if it has one.
    pub fn log(&self) -> Option<Arc<log::LogFile>> {
        lock(&self.log).clone()
    }

    /// Says which log its output goes to.
    pub fn set_log(&self, file: Option<Arc<log::LogFile>>) {
        *lock(&self.log) = file;
    }

    /// The span of a task that works for the container.
    pub(crate) fn span(&self) -> Span {
        span::container(&self.record().sandbox_id, &self.id)
    }

    /// Runs `work` for as long as the container is known.
    pub fn spawn_task(&self, work: impl Future<Output = ()> + Send + 'static) {
        lock(&self.tasks).spawn(work.instrument(self.span()));
    }

    /// Ends all such work.
    pub fn abort_tasks(&self) {
        lock(&self.tasks).abort_all();
    }

    /// Removes the record from disk, for good, and what is beside it: an end that is told
    /// later does not bring it back.
    ///
    /// # Errors
    /// The disk refuses it; a record that is gone is no error.
    pub async fn forget(&self) -> Result<(), FileError> {
        let position = self.position.clone();
        blocking(move || remove_if_there(&position)).await?;
        self.record.remove().await
    }
}

#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn remove_if_there(path: &Path) -> Result<(), FileError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(FileError::at("remove the position in a container's log", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::container_record;

    async fn container(folder: &Path) -> Container {
        std::fs::create_dir(folder.join("containers")).unwrap();
        Container::create(folder, container_record("c", "s")).await.unwrap()
    }

    #[tokio::test]
    async fn the_first_end_stands_and_is_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let container = container(folder.path()).await;
        assert!(container.record_exit(Exit::reported(3, false, 9), || ()).await);
        assert!(!container.record_exit(Exit::machine_gone("later"), || ()).await);
        let loaded = Container::load(folder.path().join("containers/c.json")).unwrap();
        assert_eq!(loaded.record().state, State::Exited(Exit::reported(3, false, 9)));
    }

    #[tokio::test]
    async fn an_end_is_within_the_containers_life_and_a_code_is_one_that_processes_have() {
        let folder = tempfile::tempdir().unwrap();
        let container = container(folder.path()).await;
        let started_at = now();
        container.update(|record| record.started_at = started_at).await.unwrap();
        assert!(container.record_exit(Exit::reported(-256, false, i64::MAX), || ()).await);
        let State::Exited(exit) = container.record().state.clone() else { panic!("it has not exited") };
        assert_eq!((exit.code, exit.reason.as_str()), (255, "Error"));
        assert!((started_at..=now()).contains(&exit.finished_at));

        let other = Container::create(folder.path(), container_record("d", "s")).await.unwrap();
        other.update(|record| record.started_at = started_at).await.unwrap();
        assert!(other.record_exit(Exit::reported(0, false, 1), || ()).await);
        let State::Exited(exit) = other.record().state.clone() else { panic!("it has not exited") };
        assert_eq!((exit.code, exit.finished_at), (0, started_at));
    }

    #[tokio::test]
    async fn an_end_after_the_removal_brings_no_record_back() {
        let folder = tempfile::tempdir().unwrap();
        let container = container(folder.path()).await;
        std::fs::write(container.position_path(), "").unwrap();
        container.forget().await.unwrap();
        assert!(!container.position_path().exists());
        assert!(container.record_exit(Exit::reported(0, false, 9), || ()).await);
        container.update(|record| record.guest_pid = 2).await.unwrap();
        assert!(!folder.path().join("containers/c.json").exists());
    }
}
