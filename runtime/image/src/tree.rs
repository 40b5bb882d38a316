//! A folder that takes the files of an image, and out of which no path leads.
//!
//! Paths are resolved here, a component at a time, and the kernel never follows a link or
//! `..`. A symbolic link that an earlier layer planted is read, and its target is
//! resolved as if the folder were the root. The last component is never followed. Nothing
//! here needs `/proc`.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat,
    linkat, mkdirat, mknodat, openat, readlinkat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

/// Most bytes of a path.
const MAX_PATH: usize = 4095;
/// Most folders inside one another, including those that a link leads through.
/// Removing and packing the tree recurse into each.
pub(super) const MAX_DEPTH: usize = 256;
const MAX_NAME: usize = 255;

/// Most links on the way to a folder, as in Linux.
const MAX_LINKS: usize = 40;

/// The folder of an image's files.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    /// The number of folders that were made because an entry is in them.
    made: Cell<u64>,
}

/// The place of an entry: an open folder and a name in it.
#[derive(Debug)]
pub(super) struct Place {
    parent: OwnedFd,
    name: OsString,
}

/// The owner, mode, time and extended attributes of an entry.
#[derive(Clone, Debug)]
pub(super) struct Attributes {
    /// The user id of the owner.
    pub uid: u32,
    /// The group id of the owner.
    pub gid: u32,
    /// Permissions, with setuid, setgid and sticky bits.
    pub mode: u32,
    /// The time of the last change: seconds since 1970, and nanoseconds.
    pub mtime: (i64, i64),
    /// Extended attributes.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

/// Checks that a path of an archive stays inside: it has no `..`. A leading
/// slash, which some builders write, means the image's root.
///
/// # Errors
/// The reason of the refusal.
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
        let root = openat(CWD, root, FOLDER, Mode::empty())?;
        Ok(Self { root, made: Cell::new(0) })
    }

    /// The number of folders that were made without an entry.
    pub(super) const fn made(&self) -> u64 {
        self.made.get()
    }

    /// The place of the folder itself.
    pub(super) fn root(&self) -> io::Result<Place> {
        Ok(Place { parent: self.root.try_clone()?, name: ".".into() })
    }

    /// Finds an entry's place. With `make`, missing folders on the way are
    /// made.
    pub(super) fn place(&self, path: &Path, make: bool) -> io::Result<Place> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let (parent, depth) = self.walk(path.parent().unwrap_or(Path::new("")), make)?;
        if make && depth >= MAX_DEPTH {
            return Err(Errno::NAMETOOLONG.into());
        }
        Ok(Place { parent, name })
    }

    /// Opens a folder, following links inside the tree.
    pub(super) fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(self.walk(path, false)?.0)
    }

    /// Opens a folder, and returns its depth: a short path through links may lead far
    /// down. With `make`, missing folders are made, also on the path of a link.
    fn walk(&self, path: &Path, make: bool) -> io::Result<(OwnedFd, usize)> {
        // The folders from the one below the root to the current one.
        let mut folders: Vec<OwnedFd> = Vec::new();
        let mut rest: Vec<OsString> = components(path.as_os_str());
        let mut links = 0;
        while let Some(name) = rest.pop() {
            if name == "/" {
                folders.clear();
                continue;
            }
            if name == ".." {
                folders.pop();
                continue;
            }
            let parent = folders.last().unwrap_or(&self.root);
            match openat(parent, &name, FOLDER, Mode::empty()) {
                Ok(folder) => folders.push(folder),
                Err(Errno::NOENT) if make => {
                    if folders.len() >= MAX_DEPTH {
                        return Err(Errno::NAMETOOLONG.into());
                    }
                    mkdirat(parent, &name, Mode::from_raw_mode(0o755))?;
                    self.made.set(self.made.get().saturating_add(1));
                    let folder = openat(parent, &name, FOLDER, Mode::empty())?;
                    folders.push(folder);
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let target = readlinkat(parent, &name, Vec::new()).map_err(|error| match error {
                        Errno::INVAL => Errno::NOTDIR,
                        error => error,
                    })?;
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    rest.extend(components(OsStr::from_bytes(target.as_bytes())));
                }
                Err(error) => return Err(error.into()),
            }
        }
        let depth = folders.len();
        let folder = folders.pop().map_or_else(|| self.root.try_clone(), Ok)?;
        Ok((folder, depth))
    }
}

/// Folders are opened as paths, and never through a link.
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The components of a path, the first one last; "/" stands for the root.
fn components(path: &OsStr) -> Vec<OsString> {
    let names = Path::new(path).components().filter(|component| *component != Component::CurDir);
    let mut names: Vec<_> = names.map(|component| component.as_os_str().to_owned()).collect();
    names.reverse();
    names
}

impl Place {
    /// The kind of the file at this place.
    pub(super) fn existing(&self) -> io::Result<Option<FileType>> {
        match statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the file or folder at this place, with everything below it.
    pub(super) fn clear(&self) -> io::Result<()> {
        remove_all(&self.parent, &self.name)
    }

    /// Makes a folder. An existing folder stays with its content.
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

    /// Sets the owner, and then the permissions: changing the owner clears
    /// setuid.
    pub(super) fn set_owner(&self, attributes: &Attributes, kind: FileType) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        chownat(&self.parent, &self.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        if kind != FileType::Symlink {
            let mode = Mode::from_raw_mode(attributes.mode & 0o7777);
            chmodat(&self.parent, &self.name, mode, AtFlags::empty())?;
        }
        Ok(())
    }

    /// Sets an extended attribute. Must come after [`Place::set_owner`], which clears
    /// `security.capability`. Only files and folders have attributes.
    pub(super) fn set_xattr(&self, name: &str, value: &[u8]) -> io::Result<()> {
        match self.existing()? {
            Some(FileType::RegularFile | FileType::Directory) => {}
            _ => return Err(Errno::PERM.into()),
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = openat(&self.parent, &self.name, flags, Mode::empty())?;
        Ok(rustix::fs::fsetxattr(file, name, value, XattrFlags::empty())?)
    }

    /// Sets the time of the last change: seconds and nanoseconds.
    pub(super) fn set_time(&self, (seconds, nanoseconds): (i64, i64)) -> io::Result<()> {
        let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
        let times = Timestamps { last_access: time, last_modification: time };
        Ok(utimensat(&self.parent, &self.name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Sets the time of a folder; anything else is left alone.
    pub(super) fn set_folder_time(&self, time: (i64, i64)) -> io::Result<()> {
        if self.existing()? == Some(FileType::Directory) { self.set_time(time) } else { Ok(()) }
    }
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
