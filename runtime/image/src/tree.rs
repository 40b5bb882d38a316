//! A folder that takes the files of an image, and out of which no path leads.
//!
//! Every path is resolved by the kernel inside the folder (`openat2` with
//! `RESOLVE_IN_ROOT`), so a symbolic link that an earlier layer planted leads
//! nowhere else. The last component is never followed.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, linkat, mkdirat, mknodat, openat, openat2, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

/// Longest path that is taken, in bytes.
const MAX_PATH: usize = 4095;
/// Most folders inside one another, those included that a link leads through:
/// what removes or packs the tree calls itself for each.
pub(super) const MAX_DEPTH: usize = 256;
const MAX_NAME: usize = 255;

/// The folder.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    /// Components of the root's own path.
    depth: usize,
    /// Folders made because something is in them.
    made: Cell<u64>,
}

/// Where an entry goes: an open folder and a name in it.
#[derive(Debug)]
pub(super) struct Place {
    parent: OwnedFd,
    name: OsString,
}

/// Who owns an entry, and what is said of it.
#[derive(Clone, Debug)]
pub(super) struct Attributes {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permissions, with setuid, setgid and sticky bits.
    pub mode: u32,
    /// Seconds since 1970, and nanoseconds.
    pub mtime: (i64, i64),
    /// Extended attributes.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

/// A path of an archive that stays inside: without `..`, and below the image's
/// root also when it is written with a slash in front, as some builders do.
///
/// # Errors
/// Why it is refused.
pub(super) fn safe_path(bytes: &[u8]) -> Result<PathBuf, String> {
    let shown = || String::from_utf8_lossy(bytes.get(..200).unwrap_or(bytes)).into_owned();
    if bytes.len() > MAX_PATH {
        return Err(format!("path of {} bytes is too long: `{}…`", bytes.len(), shown()));
    }
    if bytes.contains(&0) {
        return Err(format!("path contains a zero byte: `{}`", shown()));
    }
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(bytes)).components() {
        match component {
            Component::CurDir | Component::RootDir => {}
            Component::Normal(name) if name.len() <= MAX_NAME => path.push(name),
            Component::Normal(_) => return Err(format!("name is too long in path `{}`", shown())),
            Component::ParentDir | Component::Prefix(_) => {
                return Err(format!("path `{}` contains `..`", shown()));
            }
        }
    }
    if path.components().count() > MAX_DEPTH {
        return Err(format!("path is too deep: `{}…`", shown()));
    }
    Ok(path)
}

impl Tree {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty())?;
        let depth = real_path(&root)?.components().count();
        Ok(Self { root, depth, made: Cell::new(0) })
    }

    /// How many folders were made that nobody asked for.
    pub(super) const fn made(&self) -> u64 {
        self.made.get()
    }

    /// The tree's own place.
    pub(super) fn root(&self) -> io::Result<Place> {
        Ok(Place { parent: self.resolve(Path::new(""))?, name: ".".into() })
    }

    /// An entry's place. Folders on the way are made when `make` says so.
    pub(super) fn place(&self, path: &Path, make: bool) -> io::Result<Place> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let parent = self.folder(path.parent().unwrap_or(Path::new("")), make)?;
        if make {
            self.has_room(&parent)?;
        }
        Ok(Place { parent, name })
    }

    /// Whether there may be more in a folder. How deep it is says only the
    /// kernel, because a short path through links leads far down.
    fn has_room(&self, folder: &OwnedFd) -> io::Result<()> {
        let depth = real_path(folder)?.components().count().saturating_sub(self.depth);
        if depth >= MAX_DEPTH { Err(Errno::NAMETOOLONG.into()) } else { Ok(()) }
    }

    /// Opens a folder, following links inside the tree.
    pub(super) fn folder(&self, path: &Path, make: bool) -> io::Result<OwnedFd> {
        match self.resolve(path) {
            Err(Errno::NOENT) if make => {}
            result => return Ok(result?),
        }
        let mut walked = PathBuf::new();
        for component in path.components() {
            let parent = self.resolve(&walked)?;
            walked.push(component);
            match self.resolve(&walked) {
                Err(Errno::NOENT) => {
                    self.has_room(&parent)?;
                    mkdirat(&parent, component.as_os_str(), Mode::from_raw_mode(0o755))?;
                    self.made.set(self.made.get().saturating_add(1));
                }
                result => {
                    result?;
                }
            }
        }
        Ok(self.resolve(path)?)
    }

    fn resolve(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(&self.root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }
}

impl Place {
    /// Kind and permissions of what is there.
    pub(super) fn existing(&self) -> io::Result<Option<FileType>> {
        match statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what is there, with everything below it.
    pub(super) fn clear(&self) -> io::Result<()> {
        remove_all(&self.parent, &self.name)
    }

    /// A folder; one that is there stays with what it holds.
    pub(super) fn make_folder(&self) -> io::Result<()> {
        match self.existing()? {
            Some(FileType::Directory) => return Ok(()),
            Some(_) => self.clear()?,
            None => {}
        }
        Ok(mkdirat(&self.parent, &self.name, Mode::from_raw_mode(0o755))?)
    }

    pub(super) fn make_file(&self) -> io::Result<std::fs::File> {
        self.clear()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&self.parent, &self.name, flags, Mode::from_raw_mode(0o600))?.into())
    }

    pub(super) fn make_symlink(&self, target: &OsStr) -> io::Result<()> {
        self.clear()?;
        Ok(symlinkat(target, &self.parent, &self.name)?)
    }

    pub(super) fn make_hard_link(&self, target: &Self) -> io::Result<()> {
        self.clear()?;
        Ok(linkat(&target.parent, &target.name, &self.parent, &self.name, AtFlags::empty())?)
    }

    pub(super) fn make_node(&self, kind: FileType, major: u32, minor: u32) -> io::Result<()> {
        self.clear()?;
        let device = rustix::fs::makedev(major, minor);
        Ok(mknodat(&self.parent, &self.name, kind, Mode::from_raw_mode(0o600), device)?)
    }

    /// Gives the entry its owner, and then its permissions: a change of owner
    /// takes setuid away.
    pub(super) fn set_owner(&self, attributes: &Attributes, kind: FileType) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        chownat(&self.parent, &self.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        if kind != FileType::Symlink {
            let mode = Mode::from_raw_mode(attributes.mode & 0o7777);
            chmodat(&self.parent, &self.name, mode, AtFlags::empty())?;
        }
        Ok(())
    }

    /// After [`Place::set_owner`], which takes `security.capability` away.
    pub(super) fn set_xattr(&self, name: &str, value: &[u8]) -> io::Result<()> {
        // By way of /proc, because there is no call for a name in a folder.
        Ok(rustix::fs::lsetxattr(self.proc_path(), name, value, XattrFlags::empty())?)
    }

    /// When it was changed: seconds and nanoseconds.
    pub(super) fn set_time(&self, (seconds, nanoseconds): (i64, i64)) -> io::Result<()> {
        let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
        let times = Timestamps { last_access: time, last_modification: time };
        Ok(utimensat(&self.parent, &self.name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// The same, if it is a folder.
    pub(super) fn set_folder_time(&self, time: (i64, i64)) -> io::Result<()> {
        if self.existing()? == Some(FileType::Directory) { self.set_time(time) } else { Ok(()) }
    }

    fn proc_path(&self) -> PathBuf {
        proc_path(&self.parent).join(&self.name)
    }
}

fn proc_path(file: &OwnedFd) -> PathBuf {
    use std::os::fd::AsRawFd;
    Path::new("/proc/self/fd").join(file.as_raw_fd().to_string())
}

/// Where an open folder is: `ENAMETOOLONG` where no path can say it.
fn real_path(folder: &OwnedFd) -> io::Result<PathBuf> {
    std::fs::read_link(proc_path(folder))
}

/// Removes everything in a folder.
fn empty_folder(folder: &OwnedFd) -> io::Result<()> {
    for name in names(folder)? {
        remove_all(folder, &name)?;
    }
    Ok(())
}

/// The names in a folder that is open as a path.
pub(super) fn names(folder: &OwnedFd) -> io::Result<Vec<OsString>> {
    let readable = openat(
        folder,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(&readable)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn remove_all(parent: impl AsFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(&parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = openat(&parent, name, flags, Mode::empty())?;
    empty_folder(&folder)?;
    Ok(unlinkat(&parent, name, AtFlags::REMOVEDIR)?)
}
