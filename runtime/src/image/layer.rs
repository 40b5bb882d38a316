//! Applies the layers of an image to a folder, as the OCI image specification
//! says (`layer.md`), and refuses what no honest layer holds.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use sha2::{Digest, Sha256};
use tar::{Entry, EntryType};

use super::tree::{self, Attributes, Tree, safe_path};

/// What the layers of one image may hold together.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of all files.
    pub bytes: u64,
    /// Files, folders, links and so on.
    pub entries: u64,
    /// Device nodes.
    pub devices: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 2_000_000, devices: 1024 }
    }
}

/// A layer that was not applied.
#[derive(Debug)]
pub(super) enum Failure {
    /// The layer is at fault.
    Refused(String),
    /// The disk is.
    Disk(&'static str, PathBuf, io::Error),
}

/// How a layer is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    /// By the media type of the layer's descriptor.
    pub(super) fn of(media_type: &str) -> Option<Self> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar" => Some(Self::Plain),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Some(Self::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    fn open(self, file: File) -> io::Result<Box<dyn Read>> {
        let file = BufReader::with_capacity(128 * 1024, file);
        Ok(match self {
            Self::Plain => Box::new(file),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
            Self::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(file)?;
                // 128 MiB of window: what `zstd --ultra --long=27` may ask for.
                decoder.window_log_max(27)?;
                Box::new(decoder)
            }
        })
    }
}

/// The folder that layers are applied to, and what is left of the limits.
#[derive(Debug)]
pub(super) struct Unpacker {
    tree: Tree,
    path: PathBuf,
    left: Limits,
}

impl Unpacker {
    /// `folder` exists and is empty.
    pub(super) fn new(folder: &Path, limits: &Limits) -> Result<Self, Failure> {
        let tree = Tree::open(folder).map_err(|error| Failure::Disk("open", folder.into(), error))?;
        Ok(Self { tree, path: folder.into(), left: limits.clone() })
    }

    /// Applies one layer, whose unpacked bytes must have the digest `diff_id`.
    pub(super) fn apply(&mut self, blob: &Path, packing: Packing, diff_id: &str) -> Result<(), Failure> {
        let disk = |error| Failure::Disk("read layer", blob.into(), error);
        let reader = packing.open(File::open(blob).map_err(disk)?).map_err(disk)?;
        // The archive's own overhead is at most a few blocks an entry.
        let room =
            self.left.bytes.saturating_add(self.left.entries.saturating_mul(4096)).saturating_add(1 << 20);
        let mut reader = Hashing { inner: reader.take(room), digest: Sha256::new() };
        let mut layer = Layer { seen: HashSet::new(), folders: Vec::new() };
        for entry in tar::Archive::new(&mut reader).entries().map_err(damaged)? {
            self.entry(entry.map_err(damaged)?, &mut layer)?;
        }
        // Folders last: what is put into them changes their times.
        for (path, attributes) in layer.folders.iter().rev() {
            let place = self.tree.place(path, false).map_err(|error| self.disk("set", path, error))?;
            place
                .set(attributes, FileType::Directory)
                .map_err(|error| self.disk("set attributes of", path, error))?;
        }
        io::copy(&mut reader, &mut io::sink()).map_err(damaged)?;
        if reader.inner.limit() == 0 {
            return Err(Failure::Refused(format!(
                "the layers unpack to more than {} bytes",
                self.left.bytes
            )));
        }
        let found = format!("sha256:{}", hex(&reader.digest.finalize()));
        if found != diff_id {
            return Err(Failure::Refused(format!(
                "a layer unpacks to digest {found}, and its image says {diff_id}"
            )));
        }
        Ok(())
    }

    fn entry(&mut self, mut entry: Entry<'_, impl Read>, layer: &mut Layer) -> Result<(), Failure> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        self.left.entries = self
            .left
            .entries
            .checked_sub(1)
            .ok_or_else(|| Failure::Refused("the layers hold too many files".into()))?;
        let path = safe_path(&entry.path_bytes()).map_err(Failure::Refused)?;
        if let Some(name) = path.file_name().map(OsStrExt::as_bytes)
            && let Some(hidden) = name.strip_prefix(b".wh.")
        {
            return self.whiteout(&path, hidden, layer);
        }
        let attributes = attributes(&mut entry)?;
        if path.as_os_str().is_empty() {
            // The root itself; mkfs.erofs takes its attributes from the folder.
            return set_root(&self.path, &attributes)
                .map_err(|error| self.disk("set attributes of", &path, error));
        }
        self.make(&mut entry, kind, &path, &attributes, layer)?;
        layer.seen.insert(path);
        Ok(())
    }

    fn make(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        kind: EntryType,
        path: &Path,
        attributes: &Attributes,
        layer: &mut Layer,
    ) -> Result<(), Failure> {
        let disk = |stage| move |error: io::Error| (stage, error);
        let place = self.tree.place(path, true).map_err(|error| self.inside(path, error))?;
        let made = match kind {
            EntryType::Directory => {
                layer.folders.push((path.into(), attributes.clone()));
                place.make_folder().map(|()| FileType::Directory).map_err(disk("make folder"))
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let size = entry.size();
                self.left.bytes = self.left.bytes.checked_sub(size).ok_or_else(|| {
                    Failure::Refused(format!(
                        "the layers hold too much: `{}` has {size} bytes",
                        path.display()
                    ))
                })?;
                let mut file = place.make_file().map_err(|error| self.disk("make file", path, error))?;
                copy_file(entry, &mut file, size).map_err(|error| match error.kind() {
                    // What the archive's reader says, not the disk.
                    io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::InvalidData
                    | io::ErrorKind::InvalidInput
                    | io::ErrorKind::Other => damaged(error),
                    _ => self.disk("write file", path, error),
                })?;
                Ok(FileType::RegularFile)
            }
            EntryType::Symlink => {
                let target = link_target(entry)?;
                place
                    .make_symlink(OsStr::from_bytes(&target))
                    .map(|()| FileType::Symlink)
                    .map_err(disk("make symbolic link"))
            }
            EntryType::Link => {
                let target = safe_path(&link_target(entry)?).map_err(|why| {
                    Failure::Refused(format!("hard link `{}` leaves the image: {why}", path.display()))
                })?;
                let target = self.tree.place(&target, false).map_err(|error| self.inside(&target, error))?;
                match target.existing() {
                    Ok(Some(FileType::Directory)) | Ok(None) => {
                        return Err(Failure::Refused(format!(
                            "hard link `{}` has no file to link to",
                            path.display()
                        )));
                    }
                    Ok(Some(_)) => {}
                    Err(error) => return Err(self.disk("look at", path, error)),
                }
                // It shares the attributes of its target.
                return place
                    .make_hard_link(&target)
                    .map_err(|error| self.disk("make hard link", path, error));
            }
            EntryType::Char | EntryType::Block => {
                self.left.devices = self
                    .left
                    .devices
                    .checked_sub(1)
                    .ok_or_else(|| Failure::Refused("the layers hold too many device nodes".into()))?;
                let number =
                    |number: io::Result<Option<u32>>| number.map(Option::unwrap_or_default).map_err(damaged);
                let (major, minor) =
                    (number(entry.header().device_major())?, number(entry.header().device_minor())?);
                let kind =
                    if kind == EntryType::Char { FileType::CharacterDevice } else { FileType::BlockDevice };
                place.make_node(kind, major, minor).map(|()| kind).map_err(disk("make device node"))
            }
            EntryType::Fifo => {
                place.make_node(FileType::Fifo, 0, 0).map(|()| FileType::Fifo).map_err(disk("make fifo"))
            }
            other => {
                return Err(Failure::Refused(format!(
                    "`{}` is of an unknown kind ({:#x})",
                    path.display(),
                    other.as_byte()
                )));
            }
        };
        let kind = made.map_err(|(stage, error)| self.disk(stage, path, error))?;
        if kind == FileType::Directory {
            return Ok(());
        }
        place.set(attributes, kind).map_err(|error| self.disk("set attributes of", path, error))
    }

    /// Hides what lower layers have; what this layer brings stays.
    fn whiteout(&self, path: &Path, hidden: &[u8], layer: &Layer) -> Result<(), Failure> {
        let parent = path.parent().unwrap_or(Path::new(""));
        if hidden == b".wh..opq" {
            return match self.tree.folder(parent, false) {
                Ok(folder) => self
                    .keep_only(&folder, parent, &layer.seen)
                    .map(drop)
                    .map_err(|error| self.disk("empty folder", parent, error)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(self.inside(parent, error)),
            };
        }
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(Failure::Refused(format!("whiteout `{}` hides nothing", path.display())));
        }
        let target = parent.join(OsStr::from_bytes(hidden));
        if layer.seen.contains(&target) {
            return Ok(());
        }
        match self.tree.place(&target, false) {
            Ok(place) => place.clear().map_err(|error| self.disk("remove", &target, error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.inside(&target, error)),
        }
    }

    /// Removes everything below a folder that is not of this layer; true when
    /// something stays.
    fn keep_only(&self, folder: &OwnedFd, path: &Path, seen: &HashSet<PathBuf>) -> io::Result<bool> {
        let mut stays = false;
        for name in tree::names(folder)? {
            let below = path.join(&name);
            let place = self.tree.place(&below, false)?;
            let kept = seen.contains(&below);
            if place.existing()? == Some(FileType::Directory) {
                let inside = self.tree.folder(&below, false)?;
                if self.keep_only(&inside, &below, seen)? || kept {
                    stays = true;
                    continue;
                }
            }
            if kept {
                stays = true;
            } else {
                place.clear()?;
            }
        }
        Ok(stays)
    }

    /// A path that could not be resolved: the layer's fault if something other
    /// than a folder is on the way.
    fn inside(&self, path: &Path, error: io::Error) -> Failure {
        match error.raw_os_error() {
            _ if error.kind() == io::ErrorKind::InvalidInput => {
                Failure::Refused(format!("`{}` is the root of the image", path.display()))
            }
            Some(
                libc::EEXIST | libc::ENOTDIR | libc::ELOOP | libc::EXDEV | libc::ENAMETOOLONG | libc::ENOENT,
            ) => Failure::Refused(format!(
                "`{}` does not lead to a place in the image: {error}",
                path.display()
            )),
            _ => self.disk("open", path, error),
        }
    }

    fn disk(&self, stage: &'static str, path: &Path, error: io::Error) -> Failure {
        Failure::Disk(stage, self.path.join(path), error)
    }
}

/// What one layer has brought so far.
struct Layer {
    seen: HashSet<PathBuf>,
    folders: Vec<(PathBuf, Attributes)>,
}

fn damaged(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::StorageFull {
        return Failure::Disk("write", PathBuf::new(), error);
    }
    Failure::Refused(format!("a layer is damaged: {error}"))
}

fn set_root(root: &Path, attributes: &Attributes) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::os::unix::fs::chown(root, Some(attributes.uid), Some(attributes.gid))?;
    std::fs::set_permissions(root, std::fs::Permissions::from_mode(attributes.mode & 0o7777))
}

fn copy_file(entry: &mut impl Read, file: &mut File, size: u64) -> io::Result<()> {
    let copied = io::copy(&mut entry.take(size), file)?;
    if copied == size { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn link_target(entry: &Entry<'_, impl Read>) -> Result<Vec<u8>, Failure> {
    match entry.link_name_bytes() {
        Some(target) if !target.is_empty() && target.len() <= 4095 && !target.contains(&0) => {
            Ok(target.into_owned())
        }
        _ => Err(Failure::Refused(format!(
            "link `{}` has no usable target",
            String::from_utf8_lossy(&entry.path_bytes())
        ))),
    }
}

fn attributes(entry: &mut Entry<'_, impl Read>) -> Result<Attributes, Failure> {
    let header = entry.header();
    let id =
        |id: u64| u32::try_from(id).map_err(|_| Failure::Refused(format!("owner {id} is not a user id")));
    let raw = header.as_old();
    let mut attributes = Attributes {
        uid: id(number(header.uid(), &raw.uid)?)?,
        gid: id(number(header.gid(), &raw.gid)?)?,
        mode: number(header.mode(), &raw.mode)?,
        mtime: i64::try_from(number(header.mtime(), &raw.mtime)?).unwrap_or(0),
        xattrs: Vec::new(),
    };
    let extensions = entry.pax_extensions().map_err(damaged)?;
    for extension in extensions.into_iter().flatten() {
        let extension = extension.map_err(damaged)?;
        let Ok(key) = extension.key() else { continue };
        let number = || extension.value().ok().and_then(|value| value.parse::<u64>().ok());
        match key {
            "uid" => attributes.uid = number().map_or(Ok(attributes.uid), id)?,
            "gid" => attributes.gid = number().map_or(Ok(attributes.gid), id)?,
            _ => {
                if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                    xattr(name, extension.value_bytes(), &mut attributes.xattrs)?;
                }
            }
        }
    }
    Ok(attributes)
}

/// A number of a header; a field that was left empty is zero, as every tar
/// takes it.
fn number<T: Default>(parsed: io::Result<T>, field: &[u8]) -> Result<T, Failure> {
    match parsed {
        Err(_) if field.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(T::default()),
        parsed => parsed.map_err(damaged),
    }
}

/// Attributes that mean something in a container. The overlay's own would
/// change what the guest's overlay shows, so no layer may bring them.
fn xattr(name: &str, value: &[u8], xattrs: &mut Vec<(String, Vec<u8>)>) -> Result<(), Failure> {
    if name.len() > 255 || value.len() > 64 * 1024 || name.contains('\0') || xattrs.len() >= 256 {
        return Err(Failure::Refused("an extended attribute is too large".into()));
    }
    if name.starts_with("user.") || name == "security.capability" || name.starts_with("system.posix_acl_") {
        xattrs.push((name.to_owned(), value.to_vec()));
    }
    Ok(())
}

struct Hashing<R> {
    inner: R,
    digest: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.digest.update(buffer.get(..length).unwrap_or_default());
        Ok(length)
    }
}

/// Bytes in hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
