//! Volumes that change under a running container: the kubelet's ConfigMaps,
//! Secrets, tokens and the like.
//!
//! The kubelet replaces their content at once by renaming the link `..data`,
//! and programs wait for that with inotify. An event on the host is none in the
//! guest, whose kernel sees only what itself does. So such a volume is copied
//! into the guest, and copied again when it changes, with the same rename; the
//! agent does that part. They are small, and what is not is served as any other
//! volume is.

use std::fs::{self, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::{VolumeEntry, WriteVolumeRequest};
use rustix::fs::inotify;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Volume;
use crate::agent;
use crate::container::Container;
use crate::vm::Machine;

/// The link that is renamed (Kubernetes `pkg/volume/util/atomic_writer.go`).
const DATA: &str = "..data";

/// Most bytes of all files together; a ConfigMap and a Secret have at most
/// 1 MiB, a projected volume a few of them.
const MAX_BYTES: u64 = 3 << 20;

/// Most files, links and directories.
const MAX_ENTRIES: usize = 2000;

/// How often reading is tried while the kubelet writes.
const TRIES: u32 = 5;

/// How long after a change to look: several come together.
const SETTLE: Duration = Duration::from_millis(20);

/// Whether `source` is such a volume, and small.
pub(super) fn is_live(source: &Path) -> bool {
    let link = source.join(DATA).symlink_metadata();
    link.is_ok_and(|found| found.is_symlink()) && read(source).is_ok_and(|entries| entries.is_some())
}

/// Copies a volume into the machine, as it is now.
///
/// # Errors
/// The agent's, or one of the host's files as an internal error.
pub async fn send(machine: &Machine, volume: &Volume) -> Result<(), agent::Error> {
    const STAGE: &str = "copy volume";
    let source = volume.source.path.clone();
    let read = tokio::task::spawn_blocking(move || read(&source)).await;
    let failed = |cause: String| agent::Error {
        stage: STAGE,
        status: Box::new(tonic::Status::internal(format!("{}: {cause}", volume.source.path.display()))),
    };
    let entries = match read {
        Ok(Ok(Some(entries))) => entries,
        // It has grown; the container keeps what it has.
        Ok(Ok(None)) => return Err(failed(format!("it has more than {MAX_BYTES} bytes by now"))),
        Ok(Err(cause)) => return Err(failed(cause.to_string())),
        Err(panic) => return Err(failed(panic.to_string())),
    };
    let request = WriteVolumeRequest { name: volume.name.clone(), entries };
    machine.agent.call(STAGE, async |mut agent| agent.write_volume(request).await).await.map(drop)
}

/// Follows the changes of a container's volumes, for as long as it is known.
pub fn follow(machine: &Arc<Machine>, container: &Arc<Container>) {
    for volume in container.record().volumes.iter().filter(|volume| volume.live) {
        let (machine, volume) = (machine.clone(), volume.clone());
        container.attend(async move {
            if let Err(error) = follow_one(&machine, &volume).await {
                tracing::warn!(volume = %volume.source.path.display(), %error, "changes of a volume are not seen");
            }
        });
    }
}

async fn follow_one(machine: &Machine, volume: &Volume) -> io::Result<()> {
    let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    let wanted = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::DELETE;
    inotify::add_watch(&events, &volume.source.path, wanted | inotify::WatchFlags::ONLYDIR)?;
    // SAFETY: an `OwnedFd` is the same open descriptor for as long as it lives.
    let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE)? };
    loop {
        // At first for what has changed before somebody watched.
        if let Err(error) = send(machine, volume).await {
            tracing::warn!(volume = %volume.source.path.display(), %error, "copy a volume that has changed");
        }
        events.readable().await?.clear_ready();
        tokio::time::sleep(SETTLE).await;
        drain(events.get_ref());
    }
}

/// What the events say does not matter: the whole is looked at.
fn drain(events: &OwnedFd) {
    let mut bytes = [0; 4096];
    while rustix::io::read(events, &mut bytes).is_ok_and(|len| len > 0) {}
}

/// All that is in a volume; `None` if it is too much.
fn read(source: &Path) -> io::Result<Option<Vec<VolumeEntry>>> {
    let mut tries = 0;
    loop {
        tries += 1;
        let mut found = Found { entries: Vec::new(), bytes: 0 };
        match found.directory(source, &PathBuf::new()) {
            Ok(true) => return Ok(Some(found.entries)),
            Ok(false) => return Ok(None),
            // The kubelet has just removed what it replaced.
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < TRIES => {
                std::thread::sleep(SETTLE);
            }
            Err(error) => return Err(error),
        }
    }
}

struct Found {
    entries: Vec<VolumeEntry>,
    bytes: u64,
}

impl Found {
    /// False if it gets too much.
    fn directory(&mut self, source: &Path, inside: &Path) -> io::Result<bool> {
        for entry in fs::read_dir(source.join(inside))? {
            let path = inside.join(entry?.file_name());
            let full = source.join(&path);
            let metadata = full.symlink_metadata()?;
            let content = if metadata.is_symlink() {
                fs::read_link(&full)?.as_os_str().as_bytes().to_vec()
            } else if metadata.is_file() {
                self.bytes = self.bytes.saturating_add(metadata.len());
                if self.bytes > MAX_BYTES {
                    return Ok(false);
                }
                fs::read(&full)?
            } else if metadata.is_dir() {
                Vec::new()
            } else {
                return Ok(false);
            };
            // The agent speaks UTF-8; a ConfigMap's keys are far from more.
            let Some(name) = path.to_str().filter(|_| self.entries.len() < MAX_ENTRIES) else {
                return Ok(false);
            };
            self.entries.push(entry_of(name, &metadata, content));
            if metadata.is_dir() && !self.directory(source, &path)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn entry_of(path: &str, metadata: &Metadata, content: Vec<u8>) -> VolumeEntry {
    VolumeEntry {
        path: path.to_owned(),
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        content,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_configmap_is_read_as_it_lies_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        assert!(!is_live(path));
        fs::create_dir(path.join("..2026")).unwrap();
        fs::write(path.join("..2026/key"), "value").unwrap();
        symlink("..2026", path.join(DATA)).unwrap();
        symlink("..data/key", path.join("key")).unwrap();
        assert!(is_live(path));
        let mut entries = read(path).unwrap().unwrap();
        entries.sort_by(|one, other| one.path.cmp(&other.path));
        let seen: Vec<_> = entries.iter().map(|e| (e.path.as_str(), e.content.as_slice())).collect();
        let expected: [(&str, &[u8]); 4] =
            [("..2026", b""), ("..2026/key", b"value"), ("..data", b"..2026"), ("key", b"..data/key")];
        assert_eq!(seen, expected);
        fs::File::create(path.join("large")).unwrap().set_len(MAX_BYTES).unwrap();
        assert!(!is_live(path));
    }
}
