//! One inotify instance for all volumes that are followed.
//!
//! Root may have 128 instances on most nodes (`fs.inotify.max_user_instances`),
//! and the kubelet and others are root too: with an instance for each volume, a hundred pods
//! would use them up. There may be many thousands of watches.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use husk_base::lock;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::sync::Notify;

/// Bytes of events that are read at a time; the kernel keeps the rest.
const BUFFER: usize = 4096;

/// Bytes of stack of the thread that waits for events.
const STACK: usize = 64 * 1024;

/// The instance, and the followers of each directory.
#[derive(Debug)]
pub struct Watcher {
    events: OwnedFd,
    /// The followers by the kernel's number for the watch; several may follow one directory.
    followers: Mutex<HashMap<i32, Vec<Arc<Notify>>>>,
}

/// A directory that is watched for as long as this lives.
#[derive(Debug)]
pub struct Watch {
    watcher: Arc<Watcher>,
    number: i32,
    changed: Arc<Notify>,
}

impl Watcher {
    /// The watcher of this process, which is made by the first call that succeeds.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn shared() -> io::Result<Arc<Self>> {
        static SHARED: Mutex<Option<Arc<Watcher>>> = Mutex::new(None);
        let mut shared = lock(&SHARED);
        if let Some(watcher) = &*shared {
            return Ok(watcher.clone());
        }
        let watcher = Self::start()?;
        *shared = Some(watcher.clone());
        Ok(watcher)
    }

    fn start() -> io::Result<Arc<Self>> {
        let events = inotify::init(CreateFlags::CLOEXEC)?;
        let watcher = Arc::new(Self { events, followers: Mutex::default() });
        let theirs = watcher.clone();
        // A plain thread belongs to no async runtime, and sleeps in the kernel.
        let thread = std::thread::Builder::new().name("watch-volumes".into()).stack_size(STACK);
        thread.spawn(move || theirs.listen())?;
        Ok(watcher)
    }

    /// Watches for names that are added, removed or replaced in a directory.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn watch(self: &Arc<Self>, directory: &Path) -> io::Result<Watch> {
        let wanted = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE
            | WatchFlags::ONLYDIR
            | WatchFlags::DONT_FOLLOW;
        // The lock is taken before the kernel has the watch, so that no event
        // is read before the follower is there.
        let mut followers = lock(&self.followers);
        let number = inotify::add_watch(&self.events, directory, wanted)?;
        let changed = Arc::new(Notify::new());
        followers.entry(number).or_default().push(changed.clone());
        Ok(Watch { watcher: self.clone(), number, changed })
    }

    fn listen(&self) {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut events = inotify::Reader::new(&self.events, &mut buffer);
        loop {
            match events.next() {
                Ok(event) => self.tell(event.wd(), event.events()),
                Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "wait for changes of volumes: they are seen late from now on");
                    return;
                }
            }
        }
    }

    /// Wakes the followers of a watch. The kind of event does not matter, because the whole
    /// volume is read.
    fn tell(&self, number: i32, events: ReadFlags) {
        let mut followers = lock(&self.followers);
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            followers.values().flatten().for_each(|follower| follower.notify_one());
        } else if events.contains(ReadFlags::IGNORED) {
            // The directory was removed, and the watch with it.
            followers.remove(&number).iter().flatten().for_each(|follower| follower.notify_one());
        } else {
            followers.get(&number).into_iter().flatten().for_each(|follower| follower.notify_one());
        }
    }
}

impl Watch {
    /// Returns once something has changed since the last call, or since the
    /// watch began.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut followers = lock(&self.watcher.followers);
        // The kernel gives no number twice, so a number that is not there was removed.
        let Some(same) = followers.get_mut(&self.number) else { return };
        same.retain(|follower| !Arc::ptr_eq(follower, &self.changed));
        if same.is_empty() {
            followers.remove(&self.number);
            let _ = inotify::remove_watch(&self.watcher.events, self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    impl Watcher {
        /// Watches that the kernel has.
        fn known(&self) -> usize {
            let path = format!("/proc/self/fdinfo/{}", self.events.as_raw_fd());
            fs::read_to_string(path).unwrap().lines().filter(|line| line.starts_with("inotify wd:")).count()
        }
    }

    #[tokio::test]
    async fn hundreds_of_volumes_need_one_instance() {
        let folder = tempfile::tempdir().unwrap();
        // More than a user may have instances on most nodes.
        let volumes: Vec<_> = (0..300).map(|number| folder.path().join(number.to_string())).collect();
        let mut watches = Vec::new();
        for volume in &volumes {
            fs::create_dir(volume).unwrap();
            watches.push(Watcher::shared().unwrap().watch(volume).unwrap());
        }
        assert!(watches.iter().all(|watch| Arc::ptr_eq(&watch.watcher, &watches[0].watcher)));
        for (volume, watch) in volumes.iter().zip(&watches) {
            timeout(Duration::ZERO, watch.changed()).await.unwrap_err();
            fs::write(volume.join("key"), "").unwrap();
            timeout(SOON, watch.changed()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn watches_go_with_their_volumes() {
        let folder = tempfile::tempdir().unwrap();
        let watcher = Watcher::start().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&other).unwrap();
        let first = watcher.watch(&one).unwrap();
        let second = watcher.watch(&one).unwrap();
        let third = watcher.watch(&other).unwrap();
        assert_eq!(watcher.known(), 2);
        drop(first);
        assert_eq!(watcher.known(), 2);
        fs::write(one.join("key"), "").unwrap();
        timeout(SOON, second.changed()).await.unwrap();
        drop(second);
        assert_eq!(watcher.known(), 1);
        // The removal of a directory is an event, and a new one in its place is not watched.
        fs::remove_dir(&other).unwrap();
        timeout(SOON, third.changed()).await.unwrap();
        fs::create_dir(&other).unwrap();
        let again = watcher.watch(&other).unwrap();
        drop(third);
        fs::write(other.join("key"), "").unwrap();
        timeout(SOON, again.changed()).await.unwrap();
        drop(again);
        assert_eq!(watcher.known(), 0);
        assert!(lock(&watcher.followers).is_empty());
    }

    #[tokio::test]
    async fn lost_events_are_told_to_all() {
        let folder = tempfile::tempdir().unwrap();
        let watcher = Watcher::start().unwrap();
        let watch = watcher.watch(folder.path()).unwrap();
        watcher.tell(-1, ReadFlags::QUEUE_OVERFLOW);
        timeout(SOON, watch.changed()).await.unwrap();
    }
}
