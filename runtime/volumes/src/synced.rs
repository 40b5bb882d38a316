//! Volumes that change under a running container: the kubelet's ConfigMaps,
//! Secrets, tokens and the like.
//!
//! The kubelet replaces their content at once by renaming the link `..data`,
//! and programs wait for that with inotify. An event on the host is none in the
//! guest, whose kernel sees only its own changes. So such a volume is copied
//! into the guest, and copied again when it changes; the agent does the same rename there. These
//! volumes are small, and one that is not is served as any other
//! volume is.
//!
//! A change without an event, or one that could not be copied, is found
//! nevertheless: every follower looks again at intervals.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_base::blocking;
use husk_proto::agent::VolumeEntry;
use rustix::fs::{Mode, OFlags};

use crate::read::{self, MAX_BYTES, MAX_ENTRIES, Version};
use crate::volume::Source;
use crate::watch::{Watch, Watcher};

/// The pause between a change and the copy, because several changes come together. A volume
/// that changes all the time is copied no more often than this.
const SETTLE: Duration = Duration::from_millis(100);

/// The first pause before a failed copy is tried again; each later one is twice as long.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// The pause between two looks without an event, and the longest pause before a
/// failed copy is tried again.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// The state of a volume that the guest has, as far as huskd knows. Containers
/// of a pod with the same volume share this: no state is copied twice, and none replaces a
/// newer one.
#[derive(Clone, Debug, Default)]
pub struct Copied(Arc<tokio::sync::Mutex<Option<Version>>>);

impl Copied {
    /// Reads the volume, and writes it into the guest if the guest has another state.
    ///
    /// # Errors
    /// The errors of `read` and `write`.
    pub async fn bring<E>(
        &self,
        read: impl Future<Output = Result<Vec<VolumeEntry>, E>>,
        write: impl AsyncFnOnce(Vec<VolumeEntry>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut copied = self.0.lock().await;
        let entries = read.await?;
        let version = Version::of(&entries);
        if *copied != Some(version) {
            // The guest's state is unknown until it has answered.
            *copied = None;
            write(entries).await?;
            *copied = Some(version);
        }
        Ok(())
    }
}

/// A synced volume cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// The volume is too large by now; the container keeps the last state.
    #[error(
        "{path}: it has more than {MAX_BYTES} bytes or {MAX_ENTRIES} files by now, which cannot be copied: make it \
         smaller, or restart the pod, which is then served its files"
    )]
    TooLarge {
        /// The directory.
        path: PathBuf,
    },
    /// The file system's error.
    #[error("{path}: {cause}")]
    File {
        /// The directory.
        path: PathBuf,
        /// The reason.
        cause: io::Error,
    },
}

/// Reads a volume whole, on a thread where reading may block.
///
/// # Errors
/// The directory cannot be read, or is too large by now.
pub async fn read(source: &Source) -> Result<Vec<VolumeEntry>, Unread> {
    let held = source.clone();
    let path = source.path.clone();
    match blocking(move || read::read(open(&held)?.as_fd())).await {
        Ok(Some(entries)) => Ok(entries),
        Ok(None) => Err(Unread::TooLarge { path }),
        Err(cause) => Err(Unread::File { path, cause }),
    }
}

/// Opens the directory that the container was made with.
fn open(source: &Source) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(&source.path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&root)?;
    if (stat.st_dev, stat.st_ino) != (source.device, source.inode) {
        return Err(io::Error::other("another directory has taken its place: make the container anew"));
    }
    Ok(root)
}

/// Calls `update` at once, whenever the directory changes, and at intervals;
/// after a failure it calls again soon. Never returns.
pub async fn keep_up<F, E>(source: &Path, update: impl Fn() -> F)
where
    F: Future<Output = Result<(), E>>,
    E: Display,
{
    let volume = source.display();
    let mut failures = 0;
    let mut unwatched = false;
    let mut watch: io::Result<Watch>;
    loop {
        // The watch is made anew each time, because the directory may have been replaced; and
        // before the directory is read, so that no change is missed between the two.
        watch = Watcher::shared().and_then(|watcher| watcher.watch(source));
        if let Err(error) = &watch
            && !std::mem::replace(&mut unwatched, true)
        {
            let seconds = LOOK_AGAIN.as_secs();
            tracing::warn!(%volume, %error, "cannot watch a volume: it is looked at every {seconds} s");
        }
        let wait = match update().await {
            Ok(()) => {
                if failures > 0 {
                    tracing::info!(%volume, "the volume is copied again");
                }
                failures = 0;
                LOOK_AGAIN
            }
            Err(error) => {
                failures += 1;
                let wait = pause_after(failures);
                if failures == 1 {
                    tracing::warn!(%volume, %error, "a volume that has changed is not copied: trying again");
                } else {
                    tracing::debug!(%volume, %error, ?wait, "a volume is still not copied");
                }
                wait
            }
        };
        match &watch {
            Ok(watch) => {
                let _ = tokio::time::timeout(wait, watch.changed()).await;
            }
            Err(_) => tokio::time::sleep(wait).await,
        }
        tokio::time::sleep(SETTLE).await;
    }
}

/// The pause after so many failures in a row.
fn pause_after(failures: u32) -> Duration {
    let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
    FIRST_RETRY.saturating_mul(doubled).min(LOOK_AGAIN)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::time::{Instant, timeout};

    use super::*;

    fn entries(content: &str) -> Vec<VolumeEntry> {
        vec![VolumeEntry { path: "key".into(), content: content.into(), ..VolumeEntry::default() }]
    }

    #[tokio::test]
    async fn a_state_is_copied_once_and_again_after_a_failure() {
        let copied = Copied::default();
        let of_another_container = copied.clone();
        let written = Mutex::new(Vec::new());
        let bring = async |copied: &Copied, content: &str, answer: Result<(), &'static str>| {
            let read = async { Ok(entries(content)) };
            let write = async |entries: Vec<VolumeEntry>| {
                written.lock().unwrap().push(String::from_utf8(entries[0].content.clone()).unwrap());
                answer
            };
            copied.bring(read, write).await
        };
        bring(&copied, "one", Ok(())).await.unwrap();
        bring(&of_another_container, "one", Ok(())).await.unwrap();
        bring(&of_another_container, "two", Err("the machine is slow")).await.unwrap_err();
        // After a failure the guest may have the state or not.
        bring(&copied, "one", Ok(())).await.unwrap();
        bring(&copied, "one", Ok(())).await.unwrap();
        bring(&of_another_container, "two", Ok(())).await.unwrap();
        assert_eq!(*written.lock().unwrap(), ["one", "two", "one", "two"]);
    }

    #[test]
    fn failures_are_tried_again_later_and_later() {
        let waits = [1, 2, 3, 6, 7, 1000, u32::MAX].map(|failures| pause_after(failures).as_secs());
        assert_eq!(waits, [1, 2, 4, 32, 60, 60, 60]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_copy_that_fails_is_tried_again_and_a_quiet_volume_is_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let began = Instant::now();
        let calls = Mutex::new(Vec::new());
        let update = async || {
            let mut calls = calls.lock().unwrap();
            calls.push(began.elapsed().as_secs());
            if calls.len() <= 3 { Err("no answer") } else { Ok(()) }
        };
        let following = keep_up(folder.path(), update);
        timeout(Duration::from_secs(100), following).await.unwrap_err();
        // After 1, 2 and 4 s, then a minute of silence.
        assert_eq!(*calls.lock().unwrap(), [0, 1, 3, 7, 67]);
    }

    #[tokio::test]
    async fn a_change_is_seen_at_once_though_the_directory_is_not_yet_there() {
        let folder = tempfile::tempdir().unwrap();
        let (early, late) = (folder.path().join("early"), folder.path().join("late"));
        std::fs::create_dir(&early).unwrap();
        let calls = [AtomicU32::new(0), AtomicU32::new(0)];
        let count = |call: &AtomicU32| {
            let before = call.fetch_add(1, Ordering::SeqCst);
            // The second one finds its directory when it tries again.
            async move { if before == 0 { Err("no such directory") } else { Ok(()) } }
        };
        let quiet = |call: &AtomicU32| {
            call.fetch_add(1, Ordering::SeqCst);
            async { Ok::<(), Infallible>(()) }
        };
        let reached = async |call: &AtomicU32, calls: u32| {
            while call.load(Ordering::SeqCst) < calls {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let story = async {
            reached(&calls[1], 1).await;
            std::fs::create_dir(&late).unwrap();
            reached(&calls[0], 1).await;
            std::fs::write(early.join("key"), "").unwrap();
            reached(&calls[0], 2).await;
            reached(&calls[1], 2).await;
            std::fs::write(late.join("key"), "").unwrap();
            reached(&calls[1], 3).await;
        };
        let all = async {
            tokio::select! {
                () = keep_up(&early, || quiet(&calls[0])) => {}
                () = keep_up(&late, || count(&calls[1])) => {}
                () = story => {}
            }
        };
        timeout(LOOK_AGAIN / 2, all).await.unwrap();
    }

    #[test]
    fn another_directory_in_the_place_of_a_volume_is_not_copied() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        std::fs::create_dir(&path).unwrap();
        let (source, ..) = crate::volume::open(&path).unwrap();
        open(&source).unwrap();
        std::fs::rename(&path, folder.path().join("old")).unwrap();
        std::os::unix::fs::symlink("old", &path).unwrap();
        open(&source).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(open(&source).unwrap_err().to_string().contains("another directory"));
    }
}
