//! A container's writable layer on the scratch disk: its size, and its removal.
//! The container has made the tree, so it may be deeper than a path can name or
//! a stack can follow.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use nix::dir::{Dir, Entry};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use tokio::sync::watch;
use tokio::time::Instant;

/// Most entries that are counted. A larger layer is reported too small, so that
/// measuring does not hold up the agent.
const MAX_ENTRIES: u64 = 200_000;

/// Most directories that are open at once, one in the other.
const MAX_DEPTH: usize = 64;

/// Bytes and inodes of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Bytes of allocated space.
    pub bytes: u64,
    /// Files, directories and all other entries.
    pub inodes: u64,
}

/// The size of a layer, as last measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// The time and the result of the last measurement.
    pub last: watch::Sender<Option<(Instant, DiskUsage)>>,
    /// Whether a measurement is running, or waits for its turn.
    pub under_way: AtomicBool,
}

/// Adds up the tree at `root` without following links. Files that vanish
/// meanwhile, and those deeper than [`MAX_DEPTH`], do not count. Blocks: not
/// for the event loop.
pub fn measure(root: &Path) -> DiskUsage {
    let mut usage = DiskUsage::default();
    if let Ok(directory) = Dir::open(root, DIRECTORY, Mode::empty()) {
        add_up(directory, 0, &mut usage, &mut HashSet::new());
    }
    usage
}

fn add_up(mut directory: Dir, depth: usize, usage: &mut DiskUsage, linked: &mut HashSet<u64>) {
    let Ok(at) = directory.as_fd().try_clone_to_owned() else { return };
    for entry in directory.iter().flatten().filter(is_child) {
        if usage.inodes >= MAX_ENTRIES {
            return;
        }
        let name = entry.file_name();
        let Ok(stat) = fstatat(&at, name, AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
        if !is_directory(&stat) && stat.st_nlink > 1 && !linked.insert(stat.st_ino) {
            continue;
        }
        usage.inodes += 1;
        usage.bytes += stat.st_blocks.unsigned_abs() * 512;
        if is_directory(&stat)
            && depth < MAX_DEPTH
            && let Ok(child) = Dir::openat(&at, name, DIRECTORY, Mode::empty())
        {
            add_up(child, depth + 1, usage, linked);
        }
    }
}

/// Removes the tree at `root`, which need not exist.
pub fn remove(root: &Path) -> io::Result<()> {
    let top = match Dir::open(root, DIRECTORY, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other?,
    };
    let mut moved = 0;
    loop {
        let before = moved;
        let again = Dir::openat(&top, c".", DIRECTORY, Mode::empty())?;
        empty(again, &top, 0, &mut moved)?;
        if moved == before {
            return std::fs::remove_dir(root);
        }
    }
}

/// Empties a directory. Directories that are too deep are moved to the `top`,
/// where the next round finds them.
fn empty(mut directory: Dir, top: &Dir, depth: usize, moved: &mut u64) -> nix::Result<()> {
    let at = directory.as_fd().try_clone_to_owned().map_err(|_| Errno::EMFILE)?;
    for entry in directory.iter() {
        let entry = entry?;
        if !is_child(&entry) {
            continue;
        }
        let name = entry.file_name();
        match unlinkat(&at, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR | Errno::EPERM) => {}
            other => {
                other?;
                continue;
            }
        }
        if depth == MAX_DEPTH {
            *moved += 1;
            // A name that the container does not use by accident.
            let place = format!(".husk-removal-{}-{moved}", std::process::id());
            renameat(&at, name, top, place.as_str())?;
            continue;
        }
        let child = Dir::openat(&at, name, DIRECTORY, Mode::empty())?;
        empty(child, top, depth + 1, moved)?;
        unlinkat(&at, name, UnlinkatFlags::RemoveDir)?;
    }
    Ok(())
}

const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

fn is_child(entry: &Entry) -> bool {
    !matches!(entry.file_name().to_bytes(), b"." | b"..")
}

fn is_directory(stat: &FileStat) -> bool {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::fcntl::open;
    use nix::sys::stat::mkdirat;

    use super::*;

    /// A tree of `depth` directories, far beyond what a path can name.
    fn deep_tree(root: &Path, depth: usize) {
        let mut directory = open(root, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..depth {
            mkdirat(&directory, "deeper-and-deeper", Mode::S_IRWXU).unwrap();
            directory =
                nix::fcntl::openat(&directory, "deeper-and-deeper", DIRECTORY, Mode::empty()).unwrap();
        }
    }

    #[test]
    fn files_count_once_and_links_do_not_lead_away() {
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("big"), vec![1; 1 << 20]).unwrap();
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("directory")).unwrap();
        fs::write(root.path().join("directory/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(root.path().join("directory/file"), root.path().join("again")).unwrap();
        symlink(elsewhere.path(), root.path().join("away")).unwrap();
        let usage = measure(root.path());
        assert_eq!(usage.inodes, 3);
        assert!((100_000..1 << 20).contains(&usage.bytes), "{usage:?}");
    }

    #[test]
    fn a_tree_is_removed_and_what_it_links_to_stays() {
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("kept"), "").unwrap();
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("layer");
        fs::create_dir_all(root.join("a/b/c")).unwrap();
        fs::write(root.join("a/b/file"), "x").unwrap();
        symlink(elsewhere.path(), root.join("a/away")).unwrap();
        remove(&root).unwrap();
        assert!(!root.exists() && elsewhere.path().join("kept").exists());
        remove(&root).unwrap();
    }

    #[test]
    fn depth_harms_neither_measure_nor_removal() {
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("layer");
        fs::create_dir(&root).unwrap();
        deep_tree(&root, 3000);
        assert_eq!(measure(&root).inodes, MAX_DEPTH as u64 + 1);
        remove(&root).unwrap();
        assert!(!root.exists());
    }

    #[test]
    fn nothing_is_nothing() {
        assert_eq!(measure(Path::new("/nonexistent")), DiskUsage::default());
    }
}
