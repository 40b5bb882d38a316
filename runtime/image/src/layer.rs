//! Applies the layers of an image to a folder, following the OCI image
//! specification (`layer.md`), and refuses entries that no honest layer has.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use tar::EntryType;

use super::tree::{self, Attributes, Place, Tree, safe_path};
use archive::{Archive, Entry};
use reader::{Guarded, TooLarge};

mod archive;
mod attributes;
mod reader;
mod sparse;

/// Most bytes of the names of one layer's folders, which are kept until the
/// layer is applied.
const MAX_FOLDER_NAMES: u64 = 64 << 20;

/// Limits on all layers of one image together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of all files together.
    pub bytes: u64,
    /// Files, folders, links and so on, including folders that come without an
    /// entry.
    pub entries: u64,
    /// Device nodes.
    pub devices: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 1_000_000, devices: 1024 }
    }
}

/// The reason that a layer was not applied.
#[derive(Debug)]
pub(super) enum Failure {
    /// The layer is at fault.
    Refused(String),
    /// The disk is at fault.
    Disk(&'static str, PathBuf, io::Error),
}

/// Whether a media type is that of a layer.
pub(super) fn is_layer(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    )
}

/// The compression of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    /// Detects the compression by the layer's first bytes: the media type may name
    /// another one, and other runtimes ignore it.
    const fn of(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A skippable frame may come first.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

/// Decompresses a layer.
fn unpacked(file: File) -> io::Result<Box<dyn Read>> {
    let mut file = BufReader::with_capacity(128 * 1024, file);
    Ok(match Packing::of(file.fill_buf()?) {
        Packing::Plain => Box::new(file),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        Packing::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(file)?;
            // 128 MiB of window, as much as `zstd --ultra --long=27` may ask
            // for.
            decoder.window_log_max(27)?;
            Box::new(decoder)
        }
    })
}

/// The folder that layers are applied to, and the limits that remain.
#[derive(Debug)]
pub(super) struct Unpacker {
    tree: Tree,
    path: PathBuf,
    limits: Limits,
    left: Limits,
    holes: bool,
}

impl Unpacker {
    /// Makes an unpacker for `folder`, which exists and is empty.
    pub(super) fn new(folder: &Path, limits: &Limits) -> Result<Self, Failure> {
        let tree = Tree::open(folder).map_err(|error| Failure::Disk("open", folder.into(), error))?;
        Ok(Self { tree, path: folder.into(), limits: limits.clone(), left: limits.clone(), holes: false })
    }

    /// Whether a layer had a sparse file.
    pub(super) const fn has_holes(&self) -> bool {
        self.holes
    }

    /// Applies one layer. Its uncompressed bytes must have the digest
    /// `diff_id`.
    pub(super) fn apply(&mut self, blob: &Path, diff_id: &str) -> Result<(), Failure> {
        let disk = |error| Failure::Disk("read layer", blob.into(), error);
        let reader = File::open(blob).and_then(unpacked).map_err(disk)?;
        // The archive's own overhead is at most a few blocks an entry.
        let room =
            self.left.bytes.saturating_add(self.left.entries.saturating_mul(4096)).saturating_add(1 << 20);
        let mut reader = Guarded::new(reader, room);
        let mut layer = Layer::default();
        let mut archive = Archive::new(&mut reader);
        while let Some(entry) = archive.next().map_err(damaged)? {
            self.entry(&entry, &mut archive, &mut layer)?;
        }
        // Folders get their times last, because new entries change them.
        for (path, time) in layer.folders.iter().rev() {
            match self.tree.place(path, false).and_then(|place| place.set_folder_time(*time)) {
                // Another entry of the layer has replaced it.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {}
                result => result.map_err(|error| self.disk("set time of", path, error))?,
            }
        }
        if let Some(time) = layer.root_time {
            let set = self.tree.root().and_then(|root| root.set_time(time));
            set.map_err(|error| self.disk("set time of", Path::new(""), error))?;
        }
        io::copy(&mut reader, &mut io::sink()).map_err(damaged)?;
        let found = reader.digest();
        if found != diff_id {
            return Err(Failure::Refused(format!(
                "a layer unpacks to digest {found}, and its image says {diff_id}"
            )));
        }
        Ok(())
    }

    fn entry(&mut self, entry: &Entry, body: &mut impl Read, layer: &mut Layer) -> Result<(), Failure> {
        self.left.entries = self.left.entries.saturating_sub(1);
        if self.left.entries <= self.tree.made() {
            return Err(Failure::Refused(format!(
                "the layers hold more than {} files and folders",
                self.limits.entries
            )));
        }
        let path = safe_path(&entry.path).map_err(Failure::Refused)?;
        if let Some(name) = path.file_name().map(OsStrExt::as_bytes)
            && let Some(hidden) = name.strip_prefix(b".wh.")
        {
            return self.whiteout(&path, hidden, &layer.seen);
        }
        let attributes = attributes::read(entry)?;
        if path.as_os_str().is_empty() {
            layer.root_time = Some(attributes.mtime);
            return self.root(entry, &attributes);
        }
        self.make(entry, body, &path, &attributes, layer)?;
        layer.seen.insert(&path);
        Ok(())
    }

    /// Applies the entry of the root itself; mkfs.erofs takes its attributes
    /// from the folder.
    fn root(&self, entry: &Entry, attributes: &Attributes) -> Result<(), Failure> {
        if entry.kind() != EntryType::Directory {
            return Err(Failure::Refused("the root of the image is not a folder".into()));
        }
        let path = Path::new(".");
        let place = self.tree.root().map_err(|error| self.disk("open", path, error))?;
        self.set(&place, path, attributes, FileType::Directory)
    }

    fn make(
        &mut self,
        entry: &Entry,
        body: &mut impl Read,
        path: &Path,
        attributes: &Attributes,
        layer: &mut Layer,
    ) -> Result<(), Failure> {
        let place = self.tree.place(path, true).map_err(|error| self.inside(path, error))?;
        let kind = entry.kind();
        let (stage, made) = match kind {
            EntryType::Directory => {
                layer.remember_folder(path, attributes.mtime)?;
                ("make folder", place.make_folder().map(|()| FileType::Directory))
            }
            EntryType::Regular => {
                self.file(entry, body, &place, path)?;
                ("make file", Ok(FileType::RegularFile))
            }
            EntryType::Symlink => {
                let target = link_target(entry)?;
                ("make symbolic link", place.make_symlink(target).map(|()| FileType::Symlink))
            }
            // A hard link shares the attributes of its target.
            EntryType::Link => return self.hard_link(entry, &place, path),
            EntryType::Char | EntryType::Block => ("make device node", self.device(entry, &place)?),
            EntryType::Fifo => ("make fifo", place.make_node(FileType::Fifo, 0, 0).map(|()| FileType::Fifo)),
            other => {
                return Err(Failure::Refused(format!(
                    "`{}` is of an unsupported kind ({:?})",
                    path.display(),
                    char::from(other.as_byte())
                )));
            }
        };
        let kind = made.map_err(|error| self.disk(stage, path, error))?;
        self.set(&place, path, attributes, kind)
    }

    fn file(
        &mut self,
        entry: &Entry,
        body: &mut impl Read,
        place: &Place,
        path: &Path,
    ) -> Result<(), Failure> {
        self.left.bytes = self.left.bytes.checked_sub(entry.size).ok_or_else(|| {
            Failure::Refused(format!(
                "the layers hold more than {} bytes: `{}` has {}",
                self.limits.bytes,
                path.display(),
                entry.size
            ))
        })?;
        let mut file = place.make_file().map_err(|error| self.disk("make file", path, error))?;
        let Some(parts) = &entry.parts else { return self.copy(body, u64::MAX, &mut file, path) };
        self.holes = true;
        for part in parts {
            let there = file.seek(SeekFrom::Start(part.offset));
            there.map_err(|error| self.disk("write file", path, error))?;
            self.copy(body, part.length, &mut file, path)?;
        }
        // The parts of the file that are not stored stay holes.
        file.set_len(entry.size).map_err(|error| self.disk("write file", path, error))
    }

    /// Writes at most `most` bytes of an entry's contents.
    fn copy(&self, body: &mut impl Read, most: u64, file: &mut File, path: &Path) -> Result<(), Failure> {
        let mut body = body.take(most);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let length = body.read(&mut buffer).map_err(damaged)?;
            let Some(chunk) = buffer.get(..length).filter(|chunk| !chunk.is_empty()) else { return Ok(()) };
            file.write_all(chunk).map_err(|error| self.disk("write file", path, error))?;
        }
    }

    fn hard_link(&self, entry: &Entry, place: &Place, path: &Path) -> Result<(), Failure> {
        let none = || Failure::Refused(format!("hard link `{}` has no file to link to", path.display()));
        let target = safe_path(link_target(entry)?.as_bytes()).map_err(|why| {
            Failure::Refused(format!("hard link `{}` leaves the image: {why}", path.display()))
        })?;
        // A link must not replace its own target, or a folder above it.
        if target.starts_with(path) {
            return Err(none());
        }
        let target = self.tree.place(&target, false).map_err(|error| self.inside(&target, error))?;
        match target.existing() {
            Ok(Some(FileType::Directory) | None) => Err(none()),
            Ok(Some(_)) => place.make_hard_link(&target).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => none(),
                _ => self.disk("make hard link", path, error),
            }),
            Err(error) => Err(self.disk("look at", path, error)),
        }
    }

    fn device(&mut self, entry: &Entry, place: &Place) -> Result<io::Result<FileType>, Failure> {
        self.left.devices = self.left.devices.checked_sub(1).ok_or_else(|| {
            Failure::Refused(format!("the layers hold more than {} device nodes", self.limits.devices))
        })?;
        let number = |number: io::Result<Option<u32>>| number.map(Option::unwrap_or_default).map_err(damaged);
        let major = number(entry.header.device_major())?;
        let minor = number(entry.header.device_minor())?;
        let kind = match entry.kind() {
            EntryType::Char => FileType::CharacterDevice,
            _ => FileType::BlockDevice,
        };
        Ok(place.make_node(kind, major, minor).map(|()| kind))
    }

    fn set(
        &self,
        place: &Place,
        path: &Path,
        attributes: &Attributes,
        kind: FileType,
    ) -> Result<(), Failure> {
        place.set_owner(attributes, kind).map_err(|error| self.disk("set owner of", path, error))?;
        for (name, value) in &attributes.xattrs {
            match place.set_xattr(name, value) {
                // The disk does not support it, and little is lost.
                Err(error) if name.starts_with("user.") && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    tracing::debug!(path = %path.display(), name, "the disk takes no such attribute");
                }
                // The kernel refuses it on such a file, or with such a value.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM | libc::ERANGE)) =>
                {
                    return Err(Failure::Refused(format!(
                        "attribute `{name}` of `{}` cannot be: {error}",
                        path.display()
                    )));
                }
                result => result.map_err(|error| self.disk("set attribute of", path, error))?,
            }
        }
        place.set_time(attributes.mtime).map_err(|error| self.disk("set time of", path, error))
    }

    /// Hides entries of lower layers; entries of this layer stay.
    fn whiteout(&self, path: &Path, hidden: &[u8], seen: &Seen) -> Result<(), Failure> {
        let parent = path.parent().unwrap_or(Path::new(""));
        let hide = |result: io::Result<bool>, target: &Path| match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.inside(target, error)),
            Ok(_) => Ok(()),
        };
        match hidden {
            b".wh..opq" => hide(self.prune_inside(parent, seen), parent),
            b"" | b"." | b".." => {
                Err(Failure::Refused(format!("whiteout `{}` hides nothing", path.display())))
            }
            // These are AUFS's own metadata.
            _ if hidden.starts_with(b".wh.") => Ok(()),
            _ => {
                let target = parent.join(OsStr::from_bytes(hidden));
                hide(self.prune(&target, seen), &target)
            }
        }
    }

    /// Removes a file or folder with everything below it, except entries of
    /// this layer; true when some stay.
    fn prune(&self, path: &Path, seen: &Seen) -> io::Result<bool> {
        let place = self.tree.place(path, false)?;
        let mut stays = seen.contains(path);
        if place.existing()? == Some(FileType::Directory) {
            stays |= self.prune_inside(path, seen)?;
        }
        if !stays {
            place.clear()?;
        }
        Ok(stays)
    }

    fn prune_inside(&self, folder: &Path, seen: &Seen) -> io::Result<bool> {
        let names = tree::names(&self.tree.folder(folder)?)?;
        let mut stays = false;
        for name in names {
            stays |= self.prune(&folder.join(name), seen)?;
        }
        Ok(stays)
    }

    /// The error of a path that could not be resolved. The layer is at fault if
    /// something other than a folder is on the way.
    fn inside(&self, path: &Path, error: io::Error) -> Failure {
        match error.raw_os_error() {
            _ if error.kind() == io::ErrorKind::InvalidInput => {
                Failure::Refused(format!("`{}` is the root of the image", path.display()))
            }
            Some(libc::ENAMETOOLONG) => Failure::Refused(format!(
                "`{}` is deeper than {} folders, or its path is too long",
                path.display(),
                tree::MAX_DEPTH
            )),
            Some(libc::EEXIST | libc::ENOTDIR | libc::ELOOP | libc::EXDEV | libc::ENOENT) => {
                Failure::Refused(format!(
                    "`{}` does not lead to a place in the image: {error}",
                    path.display()
                ))
            }
            _ => self.disk("open", path, error),
        }
    }

    fn disk(&self, stage: &'static str, path: &Path, error: io::Error) -> Failure {
        Failure::Disk(stage, self.path.join(path), error)
    }
}

/// The state of a layer that is being applied.
#[derive(Default)]
struct Layer {
    seen: Seen,
    folders: Vec<(PathBuf, (i64, i64))>,
    /// Bytes of the folders' names so far.
    names: u64,
    root_time: Option<(i64, i64)>,
}

impl Layer {
    fn remember_folder(&mut self, path: &Path, time: (i64, i64)) -> Result<(), Failure> {
        self.names = self.names.saturating_add(path.as_os_str().len() as u64);
        if self.names > MAX_FOLDER_NAMES {
            return Err(Failure::Refused("the names of a layer's folders are too long".into()));
        }
        self.folders.push((path.into(), time));
        Ok(())
    }
}

/// A set of paths, kept as hashes: a million long names would take gigabytes.
/// The key of the hashes is random, so nobody can construct a collision.
#[derive(Default)]
struct Seen {
    key: RandomState,
    hashes: HashSet<u64>,
}

impl Seen {
    fn insert(&mut self, path: &Path) {
        self.hashes.insert(self.key.hash_one(path));
    }

    fn contains(&self, path: &Path) -> bool {
        self.hashes.contains(&self.key.hash_one(path))
    }
}

fn damaged(error: io::Error) -> Failure {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<TooLarge>()) {
        Some(too_large) => Failure::Refused(too_large.to_string()),
        None => Failure::Refused(format!("a layer is damaged: {error}")),
    }
}

fn link_target(entry: &Entry) -> Result<&OsStr, Failure> {
    let target = &entry.link;
    if target.is_empty() || target.len() > 4095 || target.contains(&0) {
        let path = entry.path.get(..200).unwrap_or(&entry.path);
        return Err(Failure::Refused(format!(
            "link `{}` has no usable target",
            String::from_utf8_lossy(path)
        )));
    }
    Ok(OsStr::from_bytes(target))
}

#[cfg(test)]
mod tests;
