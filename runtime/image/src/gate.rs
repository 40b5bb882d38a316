//! Bounds on all pulls together: how many run at a time, and how much of the disk they
//! leave free.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_base::lock;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Error, ImageConfig};

/// Most pulls that wait for others.
const MAX_WAITING: usize = 256;
/// How often free space is checked while a pull writes.
const LOOK: Duration = Duration::from_millis(100);

/// The bounds of one image store.
#[derive(Debug)]
pub(super) struct Gates {
    pulls: Semaphore,
    unpacks: Semaphore,
    waiting: AtomicUsize,
    directory: PathBuf,
    min_free: u64,
}

/// The pulls that run, so that one reference is pulled by one at a time.
#[derive(Debug, Default)]
pub(super) struct InFlight(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl InFlight {
    /// The lock under which a reference is pulled.
    pub(super) fn turn(&self, reference: &str) -> Arc<tokio::sync::Mutex<()>> {
        lock(&self.0).entry(reference.to_owned()).or_default().clone()
    }

    /// Forgets the references that nobody pulls any more.
    pub(super) fn forget_done(&self) {
        lock(&self.0).retain(|_, pull| Arc::strong_count(pull) > 1);
    }

    /// The number of references that are being pulled.
    pub(super) fn count(&self) -> usize {
        lock(&self.0).len()
    }
}

/// Counts a waiting pull while it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gates {
    /// Makes the bounds. `directory` is on the disk of the images.
    pub(super) fn new(config: &ImageConfig, directory: &Path) -> Self {
        let permits = |count: usize| Semaphore::new(count.clamp(1, Semaphore::MAX_PERMITS));
        Self {
            pulls: permits(config.parallel_pulls),
            unpacks: permits(config.parallel_unpacks),
            waiting: AtomicUsize::new(0),
            directory: directory.to_owned(),
            min_free: config.min_free,
        }
    }

    /// Waits until there may be one more pull.
    ///
    /// # Errors
    /// Too many wait already.
    pub(super) async fn pull(&self, reference: &str) -> Result<SemaphorePermit<'_>, Error> {
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        if waiting >= MAX_WAITING {
            return Err(Error::Busy { reference: reference.to_owned(), waiting });
        }
        self.pulls.acquire().await.map_err(|_| Error::Busy { reference: reference.to_owned(), waiting })
    }

    /// Waits until one more image may be unpacked. Only pulls wait here, so the queue
    /// is as bounded as theirs.
    pub(super) async fn unpack(&self, reference: &str) -> Result<SemaphorePermit<'_>, Error> {
        self.unpacks.acquire().await.map_err(|_| Error::Busy { reference: reference.to_owned(), waiting: 0 })
    }

    /// Checks that writing `bytes` more leaves `min_free` bytes of the disk.
    ///
    /// # Errors
    /// Less would be left.
    pub(super) fn has_room(&self, reference: &str, bytes: u64) -> Result<(), Error> {
        // If the disk cannot be asked, the next write will say so.
        let Ok(disk) = rustix::fs::statvfs(&self.directory) else { return Ok(()) };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if free >= self.min_free.saturating_add(bytes) {
            return Ok(());
        }
        Err(Error::NoRoom {
            reference: reference.to_owned(),
            path: self.directory.clone(),
            free_mib: free >> 20,
            min_free_mib: self.min_free >> 20,
        })
    }

    /// Runs work that writes to the disk, and drops it when too little is left.
    ///
    /// # Errors
    /// The work's, or that there is no room.
    pub(super) async fn while_there_is_room<T>(
        &self,
        reference: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let watch = async {
            loop {
                if let Err(error) = self.has_room(reference, 0) {
                    return error;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            done = work => done,
            error = watch => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gates(folder: &Path, change: impl FnOnce(&mut ImageConfig)) -> Gates {
        let mut config = ImageConfig::default();
        change(&mut config);
        Gates::new(&config, folder)
    }

    #[tokio::test]
    async fn as_many_pulls_as_are_allowed_run_and_a_bounded_number_waits() {
        let folder = tempfile::tempdir().unwrap();
        let gates = gates(folder.path(), |config| config.parallel_pulls = 1);
        let first = gates.pull("x").await.unwrap();
        let waiting: Vec<_> = (0..MAX_WAITING).map(|_| Box::pin(gates.pull("x"))).collect();
        let mut waiting = futures::future::join_all(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        let error = gates.pull("x").await.unwrap_err();
        assert!(error.to_string().contains("256 pulls wait already"), "{error}");
        drop(waiting);
        drop(first);
        drop(gates.pull("x").await.unwrap());
    }

    #[tokio::test]
    async fn work_ends_when_the_disk_fills() {
        let folder = tempfile::tempdir().unwrap();
        let free = |gates: &Gates| match gates.has_room("x", u64::MAX).unwrap_err() {
            Error::NoRoom { free_mib, .. } => free_mib,
            error => panic!("{error}"),
        };
        let here = free(&gates(folder.path(), |_| {}));
        let roomy = gates(folder.path(), |config| config.min_free = 0);
        assert_eq!(roomy.while_there_is_room("x", async { Ok(7) }).await.unwrap(), 7);
        let full = gates(folder.path(), |config| config.min_free = (here + 1024) << 20);
        let error = full.while_there_is_room("x", std::future::pending::<Result<(), _>>()).await.unwrap_err();
        assert!(error.is_disk_full() && error.to_string().contains("`min_free_mib` of [images]"), "{error}");
    }
}
