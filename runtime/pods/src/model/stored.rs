//! Records that are on disk, and that everybody reads.
//!
//! A reader gets the record as an [`Arc`], and may wait for what it becomes; it holds
//! nobody up. Changes come one after the other, and each is on disk before a reader
//! sees it. The disk is written on a thread where that may block; a change that has
//! begun is made to its end, also when its caller goes away.

use std::io;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_base::record::{self, Durability, ReadError, Unknown};
use husk_base::{FileError, blocking};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

/// A record, as it is on disk and as readers see it.
#[derive(Debug)]
pub(crate) struct Stored<T> {
    published: Arc<watch::Sender<Arc<T>>>,
    /// Held by the one change that is being made.
    file: Arc<Mutex<RecordFile>>,
}

/// The file of a record.
#[derive(Debug)]
struct RecordFile {
    path: PathBuf,
    /// Fields that a later release has written.
    unknown: Unknown,
    /// The folder above the record's own, when the record's folder is new in it.
    outer: Option<PathBuf>,
    /// The record was removed for good: nothing is written any more.
    forgotten: bool,
}

impl RecordFile {
    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    fn write<T: Serialize>(&self, record: &T, durability: Durability) -> Result<(), FileError> {
        if self.forgotten {
            return Ok(());
        }
        record::write(&self.path, record, &self.unknown, durability)
            .and_then(|()| match &self.outer {
                Some(folder) if durability == Durability::Acknowledged => {
                    std::fs::File::open(folder)?.sync_all()
                }
                _ => Ok(()),
            })
            .map_err(FileError::at("write record", &self.path))
    }

    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    fn remove(&mut self) -> Result<(), FileError> {
        self.forgotten = true;
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(FileError::at("remove record", &self.path)(error))
            }
            _ => Ok(()),
        }
    }
}

impl<T: Clone + Serialize + DeserializeOwned + Send + Sync + 'static> Stored<T> {
    /// Writes a new record to `path`. Nobody was promised yet that it stays.
    ///
    /// # Errors
    /// The disk refuses it.
    pub(crate) async fn create(path: PathBuf, outer: Option<&Path>, record: T) -> Result<Self, FileError> {
        let stored = Self::with(path, outer, record, Unknown::default());
        stored.change().await.commit(Durability::Whole).await?;
        Ok(stored)
    }

    /// Reads the record at `path`. This blocks.
    ///
    /// # Errors
    /// The record cannot be used, see [`ReadError`].
    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    pub(crate) fn load(path: PathBuf, outer: Option<&Path>) -> Result<Self, ReadError> {
        let (record, unknown) = record::read(&path)?;
        Ok(Self::with(path, outer, record, unknown))
    }

    fn with(path: PathBuf, outer: Option<&Path>, record: T, unknown: Unknown) -> Self {
        let file = RecordFile { path, unknown, outer: outer.map(Path::to_owned), forgotten: false };
        Self { published: Arc::new(watch::Sender::new(Arc::new(record))), file: Arc::new(Mutex::new(file)) }
    }

    /// The record as it is now.
    pub(crate) fn get(&self) -> Arc<T> {
        self.published.borrow().clone()
    }

    /// Returns once the record is as `wanted` has it.
    pub(crate) async fn wait_for(&self, mut wanted: impl FnMut(&T) -> bool) {
        // The sender lives in `self`, so this cannot fail.
        let _ = self.published.subscribe().wait_for(|record| wanted(record)).await;
    }

    /// Returns once the change that is being made, if there is one, has been told to all
    /// whom it concerns.
    pub(crate) async fn settled(&self) {
        drop(self.file.lock().await);
    }

    /// Begins a change. Others wait until it is made or dropped.
    pub(crate) async fn change(&self) -> Change<T> {
        let file = self.file.clone().lock_owned().await;
        Change { next: T::clone(&self.published.borrow()), published: self.published.clone(), file }
    }

    /// Removes the record from disk, for good: a change that comes later does not bring it
    /// back. Succeeds when it is gone already.
    ///
    /// # Errors
    /// The disk refuses it; it can be repeated.
    pub(crate) async fn remove(&self) -> Result<(), FileError> {
        let mut file = self.file.clone().lock_owned().await;
        blocking(move || file.remove()).await
    }
}

/// A change of a record that is being made: the record as it will be. Dropped, it
/// changes nothing.
pub(crate) struct Change<T> {
    next: T,
    published: Arc<watch::Sender<Arc<T>>>,
    file: OwnedMutexGuard<RecordFile>,
}

/// Keeps a change unsettled, see [`Stored::settled`].
pub(crate) struct Unsettled(#[allow(dead_code)] OwnedMutexGuard<RecordFile>);

impl<T: Serialize + Send + Sync + 'static> Change<T> {
    /// Makes the change, on disk first.
    ///
    /// # Errors
    /// The disk refuses it; the record is then unchanged.
    pub(crate) async fn commit(self, durability: Durability) -> Result<(), FileError> {
        let Self { next, published, file } = self;
        blocking(move || {
            file.write(&next, durability)?;
            published.send_replace(Arc::new(next));
            Ok(())
        })
        .await
    }

    /// Makes a change that is true whether or not it can be written: a full disk keeps
    /// nothing alive. A huskd that starts again compares the record with what it finds.
    pub(crate) async fn commit_anyway(self) -> (Result<(), FileError>, Unsettled) {
        let Self { next, published, file } = self;
        blocking(move || {
            let written = file.write(&next, Durability::Whole);
            published.send_replace(Arc::new(next));
            (written, Unsettled(file))
        })
        .await
    }
}

impl<T> Deref for Change<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.next
    }
}

impl<T> DerefMut for Change<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.next
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use serde::Deserialize;
    use tokio::time::{sleep, timeout};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Numbers {
        list: Vec<u32>,
    }

    async fn push(record: Arc<Stored<Numbers>>, number: u32) -> Result<(), FileError> {
        let mut change = record.change().await;
        change.list.push(number);
        change.commit(Durability::Acknowledged).await
    }

    /// A record whose next write does not return before the sender is dropped, or a while
    /// has passed: a fifo stands for a disk that does not answer. That write fails then.
    async fn on_slow_disk(folder: &Path) -> (Arc<Stored<Numbers>>, Sender<()>) {
        let record = Numbers { list: vec![1] };
        let record = Stored::create(folder.join("record.json"), None, record).await.unwrap();
        let fifo = folder.join("record.new");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (holder, until) = channel();
        std::thread::spawn(move || {
            let _ = until.recv_timeout(SOON / 4);
            let _ = std::fs::read(&fifo);
        });
        (Arc::new(record), holder)
    }

    #[tokio::test]
    async fn a_disk_that_does_not_answer_holds_up_its_own_record_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (record, disk) = on_slow_disk(folder.path()).await;
        let held = tokio::spawn(push(record.clone(), 2));
        let next = tokio::spawn(push(record.clone(), 3));
        // The one worker of this runtime goes on, and readers have the record as it was.
        sleep(Duration::from_millis(100)).await;
        assert!(!held.is_finished() && !next.is_finished());
        assert_eq!(record.get().list, [1]);
        drop(disk);
        held.await.unwrap().unwrap_err();
        timeout(SOON, next).await.unwrap().unwrap().unwrap();
        assert_eq!(record.get().list, [1, 3]);
        let loaded = Stored::<Numbers>::load(folder.path().join("record.json"), None).unwrap();
        assert_eq!(loaded.get(), record.get());
    }

    #[tokio::test]
    async fn a_change_whose_caller_goes_away_keeps_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let (record, disk) = on_slow_disk(folder.path()).await;
        let gone = tokio::spawn(push(record.clone(), 2));
        sleep(Duration::from_millis(100)).await;
        gone.abort();
        let next = tokio::spawn(push(record.clone(), 3));
        sleep(Duration::from_millis(100)).await;
        assert!(!next.is_finished(), "two changes would write one file at a time");
        drop(disk);
        timeout(SOON, next).await.unwrap().unwrap().unwrap();
        assert_eq!(record.get().list, [1, 3]);
    }

    #[tokio::test]
    async fn who_waits_for_a_record_goes_on_when_it_is_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        let record = Stored::create(path.clone(), None, Numbers { list: vec![1] }).await.unwrap();
        let record = Arc::new(record);
        let waiting = record.clone();
        let waiting = tokio::spawn(async move { waiting.wait_for(|record| record.list.len() == 3).await });
        push(record.clone(), 2).await.unwrap();
        assert!(!waiting.is_finished());
        push(record.clone(), 3).await.unwrap();
        timeout(SOON, waiting).await.unwrap().unwrap();
        assert_eq!(Stored::<Numbers>::load(path, None).unwrap().get().list, [1, 2, 3]);
    }
}
