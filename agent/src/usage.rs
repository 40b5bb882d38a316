//! How much a container's writable layer holds.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Most entries that are looked at. A layer with more is told too small,
/// instead of holding up the agent.
const MAX_ENTRIES: u64 = 200_000;

/// Bytes and inodes of a directory tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Space that is allocated.
    pub bytes: u64,
    /// Files, directories and all else.
    pub inodes: u64,
}

/// Adds up the tree at `root` without following links. What vanishes
/// meanwhile does not count. Blocks: not for the event loop.
pub fn measure(root: &Path) -> DiskUsage {
    let mut usage = DiskUsage::default();
    let mut linked = HashSet::new();
    let mut to_visit: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(directory) = to_visit.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if usage.inodes >= MAX_ENTRIES {
                return usage;
            }
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                to_visit.push(entry.path());
            } else if metadata.nlink() > 1 && !linked.insert(metadata.ino()) {
                continue;
            }
            usage.inodes += 1;
            usage.bytes += metadata.blocks() * 512;
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::os::unix::fs::symlink;

    use super::*;

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
    fn nothing_is_nothing() {
        assert_eq!(measure(Path::new("/nonexistent")), DiskUsage::default());
    }
}
