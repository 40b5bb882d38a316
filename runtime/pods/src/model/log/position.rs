//! How much of a container's output is in its log, for the next huskd.
//!
//! A file beside the container's record says how long the log was, and how much of each
//! stream was in it by then. It is written anew each time the log has grown by [`SPAN`],
//! and when the log is rotated. The lines behind that length tell the rest, as each holds
//! what it says it holds: so no byte is written twice and none is left out, wherever
//! huskd died. A line of which only a part was written is cut off.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use husk_proto::agent::stream::Kind;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::lines;

/// How far a log grows until its length is recorded again.
const SPAN: u64 = 256 * 1024;

/// Most bytes of a log that are read when it is taken over. An earlier release, which
/// writes no lengths, may have added more; the agent knows what is confirmed then.
const MAX_TAIL: u64 = 16 * SPAN;

/// The size of the file. Its one line is filled up with spaces, so that each write
/// replaces the one before whole.
const FILE_SIZE: usize = 256;

/// Most files of a log folder among which a rotated log is looked for.
const MAX_ENTRIES: usize = 10_000;

/// How much of each stream is in a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Taken {
    stdout: u64,
    stderr: u64,
}

impl Taken {
    /// How many bytes of a stream.
    pub(crate) const fn of(self, kind: Kind) -> u64 {
        match kind {
            Kind::Stderr => self.stderr,
            Kind::Stdin | Kind::Stdout => self.stdout,
        }
    }

    const fn of_mut(&mut self, kind: Kind) -> &mut u64 {
        match kind {
            Kind::Stderr => &mut self.stderr,
            Kind::Stdin | Kind::Stdout => &mut self.stdout,
        }
    }

    pub(super) const fn add(&mut self, kind: Kind, bytes: u64) {
        let taken = self.of_mut(kind);
        *taken = taken.saturating_add(bytes);
    }
}

/// The content of the file.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Recorded {
    device: u64,
    inode: u64,
    length: u64,
    taken: Taken,
}

/// How much is in a log that is being written.
#[derive(Debug)]
pub(super) struct Position {
    /// Where it is kept; none in tests, and if the disk has refused it.
    file: Option<File>,
    recorded: Recorded,
    length: u64,
    taken: Taken,
}

impl Position {
    /// The position in a log that was opened, from the file at `path` if an earlier huskd
    /// has left one there. `reads` says whether the log's own lines can be asked.
    pub(super) fn open(path: Option<&Path>, log: &File, log_path: &Path, reads: bool) -> io::Result<Self> {
        let mut position =
            Self { file: None, recorded: Recorded::default(), length: 0, taken: Taken::default() };
        if let Some(path) = path {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?);
            if let Some(recorded) = read(&file) {
                position.taken = recorded.taken;
                if reads {
                    position.catch_up(&recorded, log, log_path)?;
                }
            }
            position.file = Some(file);
        }
        position.moved(log)?;
        Ok(position)
    }

    /// Counts the lines that an earlier huskd has written after it recorded a length: in
    /// the log, or in the one that was moved away from its path since.
    fn catch_up(&mut self, recorded: &Recorded, log: &File, path: &Path) -> io::Result<()> {
        let metadata = log.metadata()?;
        if (metadata.dev(), metadata.ino()) == (recorded.device, recorded.inode) {
            return self.count_tail(log, recorded.length);
        }
        match find_rotated(path, recorded) {
            Some(rotated) => self.count_tail(&rotated, recorded.length),
            None => {
                tracing::warn!(log = %path.display(), "the rotated log is gone: its last lines may be repeated in the new one");
                Ok(())
            }
        }
    }

    fn count_tail(&mut self, log: &File, from: u64) -> io::Result<()> {
        let length = log.metadata()?.len();
        // A shorter one was cut by somebody else.
        let Some(added) = length.checked_sub(from) else { return Ok(()) };
        if added > MAX_TAIL {
            self.taken = Taken::default();
            return Ok(());
        }
        let mut tail = vec![0; usize::try_from(added).unwrap_or_default()];
        log.read_exact_at(&mut tail, from)?;
        let whole = lines::count(&tail, &mut self.taken);
        if whole < tail.len() {
            log.set_len(from.saturating_add(whole as u64))?;
        }
        Ok(())
    }

    /// How much of a stream is in the log.
    pub(super) const fn taken(&self, kind: Kind) -> u64 {
        self.taken.of(kind)
    }

    /// How long the log is.
    pub(super) const fn length(&self) -> u64 {
        self.length
    }

    /// The log has grown by `added`, and holds a stream up to `upto`.
    pub(super) fn advance(&mut self, kind: Kind, upto: u64, added: usize) {
        self.length = self.length.saturating_add(added as u64);
        *self.taken.of_mut(kind) = upto;
        if self.length.saturating_sub(self.recorded.length) >= SPAN {
            self.record();
        }
    }

    /// The log, or its length, is another one now.
    pub(super) fn moved(&mut self, log: &File) -> io::Result<()> {
        let metadata = log.metadata()?;
        self.length = metadata.len();
        (self.recorded.device, self.recorded.inode) = (metadata.dev(), metadata.ino());
        self.record();
        Ok(())
    }

    /// Writes it down for the next huskd. One that does not get it asks the agent for what
    /// is not confirmed.
    pub(super) fn record(&mut self) {
        self.recorded.length = self.length;
        self.recorded.taken = self.taken;
        let Some(file) = &self.file else { return };
        let written = serde_json::to_vec(&self.recorded).map_err(io::Error::from).and_then(|mut line| {
            line.resize(FILE_SIZE - 1, b' ');
            line.push(b'\n');
            file.write_all_at(&line, 0)
        });
        if let Err(error) = written {
            tracing::warn!(%error, "failed to record how much of a container's output is in its log");
        }
    }
}

fn read(file: &File) -> Option<Recorded> {
    let mut text = Vec::new();
    file.take(FILE_SIZE as u64).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// The log that was at `path` and has another name in its folder now.
fn find_rotated(path: &Path, recorded: &Recorded) -> Option<File> {
    let (folder, name) = (path.parent()?, path.file_name()?.as_encoded_bytes());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty()).ok()?;
    for entry in rustix::fs::Dir::read_from(&folder).ok()?.take(MAX_ENTRIES) {
        let entry = entry.ok()?;
        if entry.ino() != recorded.inode || !entry.file_name().to_bytes().starts_with(name) {
            continue;
        }
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&folder, entry.file_name(), flags, Mode::empty()).ok()?);
        let metadata = file.metadata().ok()?;
        if metadata.is_file() && (metadata.dev(), metadata.ino()) == (recorded.device, recorded.inode) {
            return Some(file);
        }
    }
    None
}
