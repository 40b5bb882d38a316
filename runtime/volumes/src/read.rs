//! Reads a volume whole, as it was at one moment.
//!
//! No name leads out of the volume. A pod that may write to the same directory through
//! another of its mounts could replace a file by a link while it is
//! read; so each file is opened before its type is checked, and that open file is read.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use husk_proto::agent::VolumeEntry;
use rustix::fs::{Dir, FileType, Mode, OFlags, Stat};
use sha2::{Digest, Sha256};

/// The link that is renamed (Kubernetes `pkg/volume/util/atomic_writer.go`).
const DATA: &str = "..data";

/// The most bytes of all files and links together; a ConfigMap and a Secret have at
/// most 1 MiB, a projected volume a few of them.
pub const MAX_BYTES: u64 = 3 << 20;

/// The most files, links and directories.
pub const MAX_ENTRIES: usize = 2000;

/// The most directories in each other: keys of a projected volume are paths.
const MAX_DEPTH: usize = 32;

/// How often reading is tried while the kubelet writes.
const TRIES: u32 = 5;

/// The pause between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// Whether a directory is a volume that the kubelet replaces, and small enough to be copied.
pub fn is_synced(root: BorrowedFd<'_>) -> bool {
    data_link(root).is_ok() && whole(root, What::Sizes).is_ok_and(|entries| entries.is_some())
}

/// All files, links and directories of a volume, by name; `None` if they are too many.
///
/// # Errors
/// The file system's error, or a volume that changes during every try.
pub fn read(root: BorrowedFd<'_>) -> io::Result<Option<Vec<VolumeEntry>>> {
    whole(root, What::Content)
}

/// A hash that differs for different states of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version([u8; 32]);

impl Version {
    /// The version of a state.
    pub fn of(entries: &[VolumeEntry]) -> Self {
        let mut hash = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for entry in entries {
            add(entry.path.as_bytes());
            add(&[entry.mode.to_le_bytes(), entry.uid.to_le_bytes(), entry.gid.to_le_bytes()].concat());
            add(&entry.content);
        }
        Self(hash.finalize().into())
    }
}

/// Whether the files' bytes are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Sizes,
    Content,
}

/// The result of reading a volume once.
enum Seen {
    Whole(Vec<VolumeEntry>),
    TooMuch,
    Changing,
}

fn whole(root: BorrowedFd<'_>, what: What) -> io::Result<Option<Vec<VolumeEntry>>> {
    for _ in 0..TRIES {
        match once(root, what) {
            Ok(Seen::Whole(entries)) => return Ok(Some(entries)),
            Ok(Seen::TooMuch) => return Ok(None),
            Ok(Seen::Changing) => {}
            // The kubelet has just removed the state that it replaced.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        std::thread::sleep(PAUSE);
    }
    Err(io::Error::other(format!(
        "each of the {TRIES} times that it was read it changed meanwhile, or its `{DATA}` led nowhere"
    )))
}

/// Reads a volume once.
///
/// A directory is read name by name, so the names may never have been there at the same
/// time. The kubelet completes a new state before it renames the link, and
/// removes the old one after that: the state is complete if the link leads to it before and after.
fn once(root: BorrowedFd<'_>, what: What) -> io::Result<Seen> {
    let before = data_link(root)?;
    let mut found = Found { entries: Vec::new(), bytes: 0, what };
    if !found.directory(root, Path::new(""), MAX_DEPTH)? {
        return Ok(Seen::TooMuch);
    }
    let is_there = |entry: &VolumeEntry| entry.path.as_bytes() == before && is_directory(entry);
    if data_link(root)? != before || !found.entries.iter().any(is_there) {
        return Ok(Seen::Changing);
    }
    found.entries.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(Seen::Whole(found.entries))
}

fn data_link(root: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(root, DATA, Vec::new())?.into_bytes())
}

fn is_directory(entry: &VolumeEntry) -> bool {
    FileType::from_raw_mode(entry.mode) == FileType::Directory
}

struct Found {
    entries: Vec<VolumeEntry>,
    bytes: u64,
    what: What,
}

impl Found {
    /// Reads a directory and those below it; false if the limits are exceeded.
    fn directory(&mut self, directory: BorrowedFd<'_>, inside: &Path, depth: usize) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        for entry in Dir::new(rustix::fs::openat(directory, c".", flags, Mode::empty())?)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            // The agent takes UTF-8, and keys of ConfigMaps are ASCII.
            let path = inside.join(OsStr::from_bytes(name.to_bytes()));
            let Some(path_text) = path.to_str().filter(|_| self.entries.len() < MAX_ENTRIES) else {
                return Ok(false);
            };
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let held = rustix::fs::openat(directory, name, flags, Mode::empty())?;
            let stat = rustix::fs::fstat(&held)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            let content = match kind {
                FileType::Directory => Some(Vec::new()),
                FileType::Symlink => self.count(rustix::fs::readlinkat(&held, c"", Vec::new())?.into_bytes()),
                FileType::RegularFile => self.file(&held, &stat)?,
                _ => None,
            };
            let Some(content) = content else { return Ok(false) };
            self.entries.push(VolumeEntry {
                path: path_text.to_owned(),
                mode: stat.st_mode,
                uid: stat.st_uid,
                gid: stat.st_gid,
                content,
            });
            if kind == FileType::Directory
                && (depth == 0 || !self.directory(held.as_fd(), &path, depth - 1)?)
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads a file; `None` if the limits are exceeded.
    fn file(&mut self, held: &OwnedFd, stat: &Stat) -> io::Result<Option<Vec<u8>>> {
        let room = MAX_BYTES.saturating_sub(self.bytes);
        if u64::try_from(stat.st_size).is_ok_and(|size| size > room) {
            return Ok(None);
        }
        if self.what == What::Sizes {
            self.bytes = self.bytes.saturating_add(stat.st_size.cast_unsigned());
            return Ok(Some(Vec::new()));
        }
        let mut content = Vec::new();
        // This opens the very file that is held. It may grow while it is read.
        let file = File::open(format!("/proc/self/fd/{}", held.as_raw_fd()))?;
        file.take(room + 1).read_to_end(&mut content)?;
        Ok(self.count(content))
    }

    fn count(&mut self, content: Vec<u8>) -> Option<Vec<u8>> {
        self.bytes = self.bytes.saturating_add(content.len() as u64);
        (self.bytes <= MAX_BYTES).then_some(content)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

    use tempfile::TempDir;

    use super::*;

    /// A ConfigMap that is replaced as the kubelet does it.
    struct Volume(TempDir);

    impl Volume {
        fn new(version: &str) -> Self {
            let volume = Self(tempfile::tempdir().unwrap());
            volume.write(version);
            symlink("..data/key", volume.path("key")).unwrap();
            volume
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            self.0.path().join(name)
        }

        fn write(&self, version: &str) {
            let old = fs::read_link(self.path(DATA));
            let folder = format!("..{version}");
            fs::create_dir(self.path(&folder)).unwrap();
            for key in ["key", "second"] {
                fs::write(self.path(&folder).join(key), version).unwrap();
            }
            symlink(&folder, self.path("..data_tmp")).unwrap();
            fs::rename(self.path("..data_tmp"), self.path(DATA)).unwrap();
            if let Ok(old) = old {
                fs::remove_dir_all(self.0.path().join(old)).unwrap();
            }
        }

        fn open(&self) -> OwnedFd {
            File::open(self.0.path()).unwrap().into()
        }

        fn read(&self) -> io::Result<Option<Vec<VolumeEntry>>> {
            read(self.open().as_fd())
        }

        fn is_synced(&self) -> bool {
            is_synced(self.open().as_fd())
        }
    }

    #[test]
    fn a_configmap_is_read_as_it_lies_there() {
        let plain = tempfile::tempdir().unwrap();
        assert!(!is_synced(File::open(plain.path()).unwrap().as_fd()));
        let volume = Volume::new("2026");
        assert!(volume.is_synced());
        let entries = volume.read().unwrap().unwrap();
        let seen: Vec<_> = entries.iter().map(|e| (e.path.as_str(), e.content.as_slice())).collect();
        let expected: [(&str, &[u8]); 5] = [
            ("..2026", b""),
            ("..2026/key", b"2026"),
            ("..2026/second", b"2026"),
            ("..data", b"..2026"),
            ("key", b"..data/key"),
        ];
        assert_eq!(seen, expected);
        fs::write(volume.path("..2026/key"), "2027").unwrap();
        let changed = volume.read().unwrap().unwrap();
        assert_ne!(Version::of(&entries), Version::of(&changed));
        assert_eq!(Version::of(&changed), Version::of(&volume.read().unwrap().unwrap()));
    }

    #[test]
    fn what_is_too_much_is_no_such_volume() {
        let volume = Volume::new("one");
        File::create(volume.path("large")).unwrap().set_len(MAX_BYTES).unwrap();
        assert!(!volume.is_synced());
        assert!(volume.read().unwrap().is_none());
        let volume = Volume::new("one");
        fs::create_dir_all(volume.path(&"x/".repeat(MAX_DEPTH + 2))).unwrap();
        assert!(!volume.is_synced());
        let volume = Volume::new("one");
        for number in 0..MAX_ENTRIES {
            symlink("x", volume.path(&number.to_string())).unwrap();
        }
        assert!(!volume.is_synced());
        let volume = Volume::new("one");
        let pipe = volume.path("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(!volume.is_synced());
    }

    #[test]
    fn a_link_to_nothing_is_no_state() {
        let volume = Volume::new("one");
        fs::rename(volume.path("..one"), volume.path("elsewhere")).unwrap();
        assert!(!volume.is_synced());
        assert!(volume.read().unwrap_err().to_string().contains("..data"));
        // A state outside the volume is not read either.
        fs::remove_file(volume.path(DATA)).unwrap();
        symlink(volume.path("elsewhere"), volume.path(DATA)).unwrap();
        assert!(!volume.is_synced());
    }

    #[test]
    fn no_state_is_seen_half_while_the_kubelet_replaces_it() {
        let volume = Volume::new("0");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for version in 1..400 {
                    volume.write(&version.to_string());
                }
                done.store(true, Ordering::SeqCst);
            });
            let mut states = 0;
            while !done.load(Ordering::SeqCst) || states == 0 {
                // All tries may fail while it changes without a pause.
                let Ok(entries) = volume.read() else { continue };
                let entries = entries.unwrap();
                let content = |path: &str| entries.iter().find(|e| e.path == path).map(|e| e.content.clone());
                let data = String::from_utf8(content(DATA).unwrap()).unwrap();
                let version = data.trim_start_matches('.').as_bytes();
                for key in ["key", "second"] {
                    assert_eq!(content(&format!("{data}/{key}")).unwrap(), version, "{data}/{key}");
                }
                states += 1;
            }
        });
    }

    #[test]
    fn links_lead_nowhere() {
        let volume = Volume::new("one");
        symlink("/etc", volume.path("folder")).unwrap();
        symlink("/etc/passwd", volume.path("file")).unwrap();
        let entries = volume.read().unwrap().unwrap();
        let link = |path: &str| entries.iter().find(|entry| entry.path == path).unwrap().content.clone();
        assert_eq!((link("folder"), link("file")), (b"/etc".to_vec(), b"/etc/passwd".to_vec()));
        assert!(!entries.iter().any(|entry| entry.path.starts_with("folder/")));
    }
}
