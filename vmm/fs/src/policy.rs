//! The policy for files that a guest makes or changes on the host: their owners
//! and their powers.
//!
//! The guest's kernel checks what its users may do, but a hostile one checks
//! nothing. So a pod with a user namespace may use only its own ids, and a volume
//! that is not trusted gets no file that would give a user of the host new powers:
//! a device, or a program with set-ID bits or capabilities.

use std::ffi::CStr;
use std::str::FromStr;

use rustix::fs::FileType;

use crate::Errno;

/// The bits of a mode that make a program run as its file's user or group.
const SET_UID: u32 = libc::S_ISUID;
const SET_GID: u32 = libc::S_ISGID;

/// A range of ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    first: u32,
    count: u32,
}

/// The text is not of the form `first:count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ids are given as first:count")]
pub struct NotIds;

impl FromStr for Ids {
    type Err = NotIds;

    fn from_str(text: &str) -> Result<Self, NotIds> {
        let (first, count) = text.split_once(':').ok_or(NotIds)?;
        Ok(Self { first: first.parse().map_err(|_| NotIds)?, count: count.parse().map_err(|_| NotIds)? })
    }
}

impl Ids {
    const fn has(self, id: u32) -> bool {
        id >= self.first && id - self.first < self.count
    }
}

/// The rules of one pod. By default a guest may do everything that root may.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Users that files may belong to; all if empty.
    pub uids: Vec<Ids>,
    /// Groups that files may belong to; all if empty.
    pub gids: Vec<Ids>,
    /// The prefix of the names of trusted volumes; without one, all are
    /// trusted.
    pub trusted: Option<String>,
}

impl Policy {
    /// Whether the volume with this name is trusted.
    #[must_use]
    pub fn trusts(&self, volume: &CStr) -> bool {
        self.trusted.as_ref().is_none_or(|prefix| volume.to_bytes().starts_with(prefix.as_bytes()))
    }

    /// Whether the root directory, which holds only volumes, is trusted.
    #[must_use]
    pub const fn trusts_root(&self) -> bool {
        self.trusted.is_none()
    }

    /// Checks that files may belong to a user and a group.
    ///
    /// # Errors
    /// `EPERM`.
    pub fn check_owner(&self, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
        let may = |ids: &[Ids], id: Option<u32>| {
            id.is_none_or(|id| ids.is_empty() || ids.iter().any(|range| range.has(id)))
        };
        if may(&self.uids, uid) && may(&self.gids, gid) { Ok(()) } else { Err(Errno::PERM) }
    }

    /// Checks that a file of this kind may be made. A character device of number
    /// 0 gives no access: overlayfs marks deleted files with it. A pod with a
    /// user namespace may make no other devices in trusted volumes either.
    ///
    /// # Errors
    /// `EPERM`.
    pub fn check_kind(&self, kind: FileType, device: u64, trusted: bool) -> Result<(), Errno> {
        let is_device = match kind {
            FileType::CharacterDevice => device != 0,
            FileType::BlockDevice => true,
            _ => false,
        };
        let may = trusted && self.uids.is_empty() && self.gids.is_empty();
        if is_device && !may { Err(Errno::PERM) } else { Ok(()) }
    }
}

/// Checks that a file, whose mode was `before`, may have a mode. It may keep
/// special bits that it has. On a directory, the set-group-ID bit only passes the
/// group on, and gives no power.
///
/// # Errors
/// `EPERM`.
pub fn check_mode(mode: u32, before: u32, kind: FileType, trusted: bool) -> Result<(), Errno> {
    let powers = if kind == FileType::Directory { 0 } else { SET_UID | SET_GID };
    if trusted || mode & powers & !before == 0 { Ok(()) } else { Err(Errno::PERM) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_a_first_one_and_a_count() {
        let ids: Ids = "100000:65536".parse().unwrap();
        assert!(ids.has(100_000) && ids.has(165_535) && !ids.has(99_999) && !ids.has(165_536));
        let all: Ids = "0:4294967295".parse().unwrap();
        assert!(all.has(0) && all.has(u32::MAX - 1) && !all.has(u32::MAX));
        for text in ["", "1", "1:", ":1", "-1:2", "1:2:3"] {
            assert_eq!(text.parse::<Ids>(), Err(NotIds), "{text}");
        }
    }

    #[test]
    fn without_rules_all_is_allowed() {
        let policy = Policy::default();
        assert_eq!(policy.check_owner(Some(u32::MAX - 1), Some(0)), Ok(()));
        assert_eq!(policy.check_kind(FileType::BlockDevice, 0x800, policy.trusts(c"v0")), Ok(()));
    }
}
