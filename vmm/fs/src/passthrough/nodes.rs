//! The files that the guest's kernel knows, by the numbers it knows them by.
//!
//! A file that is found for the first time gets a number and keeps an `O_PATH`
//! descriptor, until the guest has forgotten it as often as it was told of it.
//! Found again by another name it is the same node, so that the guest has one
//! inode for it: sockets, locks and shared mappings meet there.
//!
//! A directory that is mounted twice is two nodes, because Linux allows a
//! directory one name. Other files are one node across all mounts; of the
//! mounts it was found through, it prefers one that may be written. The others
//! it keeps as well: a new name of a file must be in the mount that the file is
//! reached through (link(2), `EXDEV`).

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, statx};
use rustix::path::DecInt;

use crate::Errno;
use crate::abi::{Attr, ROOT};

/// Bit at which the number of a file's device starts in what the guest sees as
/// its inode number; the bits below it are the host's.
const DEVICE_SHIFT: u32 = 48;

/// Which file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    device: (u32, u32),
    ino: u64,
    /// 0 for what is no directory.
    mount: u64,
}

/// A file, or any other thing with a name.
#[derive(Debug)]
pub struct Node {
    /// What the guest calls it.
    pub id: u64,
    /// What it is.
    pub kind: FileType,
    key: Key,
    /// It was found in a trusted volume, if not only there.
    trusted: AtomicBool,
    /// Stands for the device in inode numbers.
    device_number: u64,
    places: Mutex<Places>,
    /// As it was when the guest opened it last.
    opened: Mutex<Option<Version>>,
}

/// Through which mounts a node is reached.
#[derive(Debug)]
struct Places {
    /// What is done to the node, but for new names, is done through this one.
    main: Place,
    main_is_read_only: bool,
    /// Each with its part in [`Nodes::spares`].
    others: Vec<(Place, Arc<()>)>,
}

/// One of them.
#[derive(Debug)]
struct Place {
    fd: Arc<OwnedFd>,
    mount: u64,
}

impl Places {
    fn new(fd: OwnedFd, mount: u64, read_only: bool) -> Self {
        Self { main: Place { fd: Arc::new(fd), mount }, main_is_read_only: read_only, others: Vec::new() }
    }

    fn in_mount(&self, mount: u64) -> Option<&Place> {
        let others = self.others.iter().map(|(place, _)| place);
        [&self.main].into_iter().chain(others).find(|place| place.mount == mount)
    }
}

/// What differs between two states of a file's content: nobody can set the
/// time of its last change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    changed: (i64, u32),
    size: u64,
}

impl Version {
    /// None for a file that was changed so lately that the next change might
    /// have the same time.
    fn settled(stat: &Statx, now: Duration) -> Option<Self> {
        let changed = (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec);
        let since = Duration::new(u64::try_from(changed.0).ok()?, changed.1);
        // Times are those of the clock's ticks; some file systems keep seconds.
        let granularity = if changed.1 == 0 { Duration::from_secs(2) } else { Duration::from_millis(100) };
        (now.checked_sub(since)? > granularity).then_some(Self { changed, size: stat.stx_size })
    }
}

impl Node {
    /// The guest opens the file, which is as `stat` says. Whether that is as it
    /// was when the guest opened it the time before: what the guest remembers
    /// of its content still holds.
    pub fn is_unchanged(&self, stat: &Statx) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let version = Version::settled(stat, now);
        let before = std::mem::replace(&mut *lock(&self.opened), version);
        version.is_some() && version == before
    }

    /// Whether it is a trusted volume's.
    pub fn is_trusted(&self) -> bool {
        self.trusted.load(Ordering::Relaxed)
    }

    /// A descriptor that names it and does nothing else (`O_PATH`).
    pub fn fd(&self) -> Arc<OwnedFd> {
        lock(&self.places).main.fd.clone()
    }

    /// The same, in the mount of `directory` if the node was found there.
    pub fn fd_beside(&self, directory: &Self) -> Arc<OwnedFd> {
        let places = lock(&self.places);
        places.in_mount(directory.key.mount).unwrap_or(&places.main).fd.clone()
    }

    /// What the guest is told of it.
    pub fn attr(&self, stat: &Statx) -> Attr {
        let seconds = |time: rustix::fs::StatxTimestamp| time.tv_sec.cast_unsigned();
        Attr {
            ino: stat.stx_ino ^ (self.device_number << DEVICE_SHIFT),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: seconds(stat.stx_atime),
            mtime: seconds(stat.stx_mtime),
            ctime: seconds(stat.stx_ctime),
            atime_nsec: stat.stx_atime.tv_nsec,
            mtime_nsec: stat.stx_mtime.tv_nsec,
            ctime_nsec: stat.stx_ctime.tv_nsec,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: device_of(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: 0,
        }
    }
}

/// The path of a descriptor's file, in the process's working directory.
pub fn path(fd: &impl AsFd) -> DecInt {
    DecInt::from_fd(fd)
}

/// How FUSE writes a device's number: 12 bits of major, 20 of minor.
const fn device_of(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Attributes of what a descriptor names.
pub fn stat(fd: &impl AsFd) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    statx(fd, c"", flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
}

/// All nodes of a session.
#[derive(Debug)]
pub struct Nodes {
    root: Arc<Node>,
    limit: usize,
    table: Mutex<Table>,
    /// Counts, by its owners, the descriptors beyond one of each node.
    spares: Arc<()>,
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<u64, (Arc<Node>, u64)>,
    by_key: HashMap<Key, u64>,
    last_id: u64,
    /// Numbers of devices, in the order in which they were met.
    devices: HashMap<(u32, u32), u64>,
}

impl Nodes {
    /// A table of nodes below `root`, with at most `limit` descriptors.
    pub fn new(root: OwnedFd, limit: usize, trusted: bool) -> Result<Self, Errno> {
        let stat = stat(&root)?;
        let root = Node {
            id: ROOT,
            kind: FileType::Directory,
            key: key(&stat, FileType::Directory),
            trusted: trusted.into(),
            // Volumes are what shall have their own inode numbers.
            device_number: 0x7fff,
            places: Mutex::new(Places::new(root, stat.stx_mnt_id, true)),
            opened: Mutex::default(),
        };
        Ok(Self { root: Arc::new(root), limit, table: Mutex::new(Table::fresh()), spares: Arc::default() })
    }

    /// The node that the guest calls so.
    pub fn get(&self, id: u64) -> Result<Arc<Node>, Errno> {
        if id == ROOT {
            return Ok(self.root.clone());
        }
        let table = lock(&self.table);
        table.by_id.get(&id).map(|(node, _)| node.clone()).ok_or(Errno::STALE)
    }

    /// The guest is told of the file of this `O_PATH` descriptor, once more; it was
    /// found in a volume that is trusted, or not.
    pub fn meet(&self, fd: OwnedFd, trusted: bool) -> Result<(Arc<Node>, Statx), Errno> {
        let stat = stat(&fd)?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let key = key(&stat, kind);
        let mount = stat.stx_mnt_id;
        if let Some(node) = self.meet_again(key) {
            self.reach(&node, fd, mount)?;
            if trusted {
                node.trusted.store(true, Ordering::Relaxed);
            }
            return Ok((node, stat));
        }
        let read_only = is_read_only(&fd)?;
        let mut table = lock(&self.table);
        if table.by_id.len() + self.spares() >= self.limit {
            return Err(Errno::NFILE);
        }
        if let Some(node) = table.count(key) {
            return Ok((node, stat));
        }
        table.last_id += 1;
        let id = table.last_id;
        let device_number = table.device_number(key.device);
        let places = Mutex::new(Places::new(fd, mount, read_only));
        let trusted = trusted.into();
        let node = Arc::new(Node { id, kind, key, trusted, device_number, places, opened: Mutex::default() });
        table.by_key.insert(key, id);
        table.by_id.insert(id, (node.clone(), 1));
        Ok((node, stat))
    }

    /// A node is found again, through this mount. Where there are too many
    /// descriptors, it gets no second one: nodes need theirs more.
    fn reach(&self, node: &Node, fd: OwnedFd, mount: u64) -> Result<(), Errno> {
        let mut places = lock(&node.places);
        if places.in_mount(mount).is_some() {
            return Ok(());
        }
        if places.main_is_read_only {
            if !is_read_only(&fd)? {
                *places = Places::new(fd, mount, false);
            }
        } else if self.spares() < self.limit / 8 {
            places.others.push((Place { fd: Arc::new(fd), mount }, self.spares.clone()));
        }
        Ok(())
    }

    /// Descriptors beyond one of each node.
    pub fn spares(&self) -> usize {
        Arc::strong_count(&self.spares) - 1
    }

    fn meet_again(&self, key: Key) -> Option<Arc<Node>> {
        lock(&self.table).count(key)
    }

    /// The guest has forgotten a node, `lookups` times of those it was told.
    pub fn forget(&self, id: u64, lookups: u64) {
        let mut table = lock(&self.table);
        let Some((node, count)) = table.by_id.get_mut(&id) else { return };
        *count = count.saturating_sub(lookups);
        if *count == 0 {
            let key = node.key;
            table.by_key.remove(&key);
            let gone = table.by_id.remove(&id);
            drop(table);
            // Closing may take the last of a deleted file, which takes time.
            drop(gone);
        }
    }

    /// Forgets all.
    pub fn clear(&self) {
        *lock(&self.table) = Table::fresh();
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        lock(&self.table).by_id.len()
    }
}

impl Table {
    fn fresh() -> Self {
        Self { last_id: ROOT, ..Self::default() }
    }

    fn count(&mut self, key: Key) -> Option<Arc<Node>> {
        let id = self.by_key.get(&key)?;
        let (node, count) = self.by_id.get_mut(id)?;
        *count = count.saturating_add(1);
        Some(node.clone())
    }

    fn device_number(&mut self, device: (u32, u32)) -> u64 {
        let next = self.devices.len() as u64 % 0x7fff;
        *self.devices.entry(device).or_insert(next)
    }
}

fn key(stat: &Statx, kind: FileType) -> Key {
    let mount = if kind == FileType::Directory { stat.stx_mnt_id } else { 0 };
    Key { device: (stat.stx_dev_major, stat.stx_dev_minor), ino: stat.stx_ino, mount }
}

/// Whether the mount through which the descriptor was opened is read-only.
fn is_read_only(fd: &OwnedFd) -> Result<bool, Errno> {
    Ok(rustix::fs::fstatvfs(fd)?.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No holder leaves anything half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
