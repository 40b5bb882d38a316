//! Nodes: the files that the guest's kernel knows, by number.
//!
//! A file that is found for the first time gets a number and keeps an `O_PATH`
//! descriptor, until the guest has forgotten it as often as it has looked it
//! up. A file that is found by another name is the same node, so that the guest
//! has one inode for it, with its sockets, locks and shared mappings.
//!
//! A directory that is mounted twice is two nodes, because Linux allows a
//! directory only one name. Other files are one node across all mounts. Of the
//! mounts through which it was found, a node prefers a writable one. It keeps
//! the others as well, because a new name of a file must be in the mount that
//! the file is reached through (link(2), `EXDEV`).

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, statx};
use rustix::path::DecInt;

use crate::Errno;
use crate::abi::{Attr, ROOT};

/// The bit at which the number of a file's device starts in the inode number
/// that the guest sees; the bits below it are the host's inode number.
const DEVICE_SHIFT: u32 = 48;

/// The identity of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    device: (u32, u32),
    ino: u64,
    /// The mount of a directory; 0 for other files.
    mount: u64,
}

/// A file of any kind, as the guest knows it.
#[derive(Debug)]
pub struct Node {
    /// The number by which the guest names it.
    pub id: u64,
    /// The kind of file.
    pub kind: FileType,
    key: Key,
    /// Whether it was found in a trusted volume, if not only there.
    trusted: AtomicBool,
    /// The number that stands for the device in inode numbers.
    device_number: u64,
    places: Mutex<Places>,
    /// The version of its content when the guest last opened it.
    opened: Mutex<Option<Version>>,
}

/// The mounts through which a node is reached.
#[derive(Debug)]
struct Places {
    /// The mount through which all operations go, but for new names.
    main: Place,
    main_is_read_only: bool,
    /// The other mounts, each with its count in [`Nodes::spares`].
    others: Vec<(Place, Arc<()>)>,
}

/// A mount through which a node is reached.
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

/// A version of a file's content. It differs between two contents, because
/// nobody can set the time of the last change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    changed: (i64, u32),
    size: u64,
}

impl Version {
    /// The version; none for a file that was changed so lately that its next
    /// change might have the same time.
    fn settled(stat: &Statx, now: Duration) -> Option<Self> {
        let changed = (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec);
        let since = Duration::new(u64::try_from(changed.0).ok()?, changed.1);
        // Times have the granularity of clock ticks, or of seconds in some file
        // systems.
        let granularity = if changed.1 == 0 { Duration::from_secs(2) } else { Duration::from_millis(100) };
        (now.checked_sub(since)? > granularity).then_some(Self { changed, size: stat.stx_size })
    }
}

impl Node {
    /// Whether the file, which has `stat` when the guest opens it, is unchanged
    /// since the guest opened it before. The guest may then keep its cached
    /// content.
    pub fn is_unchanged(&self, stat: &Statx) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let version = Version::settled(stat, now);
        let before = std::mem::replace(&mut *lock(&self.opened), version);
        version.is_some() && version == before
    }

    /// Whether it was found in a trusted volume.
    pub fn is_trusted(&self) -> bool {
        self.trusted.load(Ordering::Relaxed)
    }

    /// A descriptor that only names the file (`O_PATH`).
    pub fn fd(&self) -> Arc<OwnedFd> {
        lock(&self.places).main.fd.clone()
    }

    /// Such a descriptor in the mount of `directory`, if the node was found
    /// there.
    pub fn fd_beside(&self, directory: &Self) -> Arc<OwnedFd> {
        let places = lock(&self.places);
        places.in_mount(directory.key.mount).unwrap_or(&places.main).fd.clone()
    }

    /// The attributes that the guest gets.
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

/// A device's number in FUSE's format: 12 bits of major, 20 of minor.
const fn device_of(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The attributes of the file that a descriptor names.
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
    /// Counts, by its owners, the descriptors that nodes have beyond their
    /// first.
    spares: Arc<()>,
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<u64, (Arc<Node>, u64)>,
    by_key: HashMap<Key, u64>,
    last_id: u64,
    /// The numbers of devices, in the order in which they were found.
    devices: HashMap<(u32, u32), u64>,
}

impl Nodes {
    /// Makes a table of nodes below `root`, with at most `limit` descriptors.
    pub fn new(root: OwnedFd, limit: usize, trusted: bool) -> Result<Self, Errno> {
        let stat = stat(&root)?;
        let root = Node {
            id: ROOT,
            kind: FileType::Directory,
            key: key(&stat, FileType::Directory),
            trusted: trusted.into(),
            // Volumes need inode numbers of their own; the root does not.
            device_number: 0x7fff,
            places: Mutex::new(Places::new(root, stat.stx_mnt_id, true)),
            opened: Mutex::default(),
        };
        Ok(Self { root: Arc::new(root), limit, table: Mutex::new(Table::fresh()), spares: Arc::default() })
    }

    /// The node with that number.
    pub fn get(&self, id: u64) -> Result<Arc<Node>, Errno> {
        if id == ROOT {
            return Ok(self.root.clone());
        }
        let table = lock(&self.table);
        table.by_id.get(&id).map(|(node, _)| node.clone()).ok_or(Errno::STALE)
    }

    /// Finds or makes the node of this `O_PATH` descriptor, and counts a lookup.
    /// `trusted` says whether it was found in a trusted volume.
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

    /// Notes that a node was found again, through this mount. If there are too
    /// many descriptors, it gets no second one, because new nodes need them
    /// more.
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

    /// Descriptors that nodes have beyond their first.
    pub fn spares(&self) -> usize {
        Arc::strong_count(&self.spares) - 1
    }

    fn meet_again(&self, key: Key) -> Option<Arc<Node>> {
        lock(&self.table).count(key)
    }

    /// Takes `lookups` off a node's count, because the guest has forgotten that
    /// many.
    pub fn forget(&self, id: u64, lookups: u64) {
        let mut table = lock(&self.table);
        let Some((node, count)) = table.by_id.get_mut(&id) else { return };
        *count = count.saturating_sub(lookups);
        if *count == 0 {
            let key = node.key;
            table.by_key.remove(&key);
            let gone = table.by_id.remove(&id);
            drop(table);
            // Closing may delete the last of a file, which takes time.
            drop(gone);
        }
    }

    /// Forgets all nodes but the root.
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
    // No holder of the lock leaves its data half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
