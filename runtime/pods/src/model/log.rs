//! Container logs in the CRI format: a line each of
//! `<RFC 3339 time> <stdout|stderr> <F|P> <text>`, where `P` marks a piece of a
//! longer line and `F` its last (or only) piece.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use husk_base::lock;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_util::sync::CancellationToken;

use super::fanout::Fanout;
use crate::lane::Lane;

/// Longest text in one log line, bytes; the same as other runtimes use.
const MAX_LINE: usize = 16 * 1024;

/// How long a write to a file system that a server answers for is waited for. What
/// was to be written is lost then.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// The log of one container, which both of its streams write to.
///
/// The pod's log folder may be a volume of some pod: below it, nothing leads
/// huskd elsewhere. Links on the way to the folder are the node's own, and fine.
#[derive(Debug)]
pub struct LogFile {
    folder: PathBuf,
    path: PathBuf,
    file: Mutex<File>,
    /// Whether the file is on a file system of the node's own, on which a write does
    /// not wait for a server.
    is_local: AtomicBool,
    /// Writes to other file systems, one for each stream.
    lane: Lane,
}

impl LogFile {
    /// Opens the log at `path`, which is below the pod's log `folder`, making
    /// folders that are not there.
    ///
    /// # Errors
    /// The disk refuses it, a symbolic link is below the folder, or the log is no regular
    /// file.
    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    pub fn open(folder: &Path, path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let file = append(folder, path)?;
        Ok(Self {
            folder: folder.into(),
            path: path.into(),
            is_local: AtomicBool::new(is_local(&file)),
            file: Mutex::new(file),
            lane: Lane::new(2, WRITE_LIMIT),
        })
    }

    /// Goes on in a new file at the same path, after log rotation has moved the
    /// old one away.
    ///
    /// # Errors
    /// As [`LogFile::open`]; the old file stays in use then.
    pub fn reopen(&self) -> io::Result<()> {
        let file = append(&self.folder, &self.path)?;
        self.is_local.store(is_local(&file), Ordering::Relaxed);
        *lock(&self.file) = file;
        Ok(())
    }

    /// Appends to the log: at once on the node's own disks, so that nothing comes
    /// between the read of a container's output and this; else on a thread of its
    /// own, in bounded time.
    async fn write(self: &Arc<Self>, entry: &[u8]) -> io::Result<()> {
        if self.is_local.load(Ordering::Relaxed) {
            return lock(&self.file).write_all(entry);
        }
        let (log, entry) = (self.clone(), entry.to_vec());
        let written = self.lane.run_now(move || lock(&log.file).write_all(&entry)).await;
        written.map_err(|why| io::Error::new(io::ErrorKind::TimedOut, why))?
    }
}

/// Whether a file is on a disk or in memory of the node. Of other file systems none
/// is known to answer in time.
fn is_local(file: &File) -> bool {
    use nix::sys::statfs::{
        BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC,
        XFS_SUPER_MAGIC, fstatfs,
    };
    let own = [
        BTRFS_SUPER_MAGIC,
        EXT4_SUPER_MAGIC,
        F2FS_SUPER_MAGIC,
        OVERLAYFS_SUPER_MAGIC,
        TMPFS_MAGIC,
        XFS_SUPER_MAGIC,
    ];
    fstatfs(file).is_ok_and(|found| own.contains(&found.filesystem_type()))
}

/// Opens a file below `folder` to append to it, one component after the other.
fn append(folder: &Path, path: &Path) -> io::Result<File> {
    let wrong = |reason: &str| io::Error::new(io::ErrorKind::InvalidInput, reason);
    let inside = path.strip_prefix(folder).map_err(|_| wrong("it is not below the pod's log folder"))?;
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut below = rustix::fs::open(folder, directory, Mode::empty())?;
    let mut parts = inside.iter().peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_some() {
            match rustix::fs::mkdirat(&below, part, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            below = open_below(&below, part, directory, Mode::empty())?;
            continue;
        }
        // A fifo in the file's place must not hold the daemon up.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = open_below(&below, part, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o640))?;
        let file = File::from(file);
        return if file.metadata()?.is_file() { Ok(file) } else { Err(wrong("it is not a regular file")) };
    }
    Err(wrong("it has no name"))
}

/// Opens an entry of a folder, and no link (openat2(2)).
fn open_below(folder: &OwnedFd, name: &OsStr, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(folder, name, flags, mode, resolve).map_err(|errno| match errno {
        Errno::LOOP => io::Error::other(format!(
            "`{}` is a symbolic link: none is followed below the pod's log folder",
            name.display()
        )),
        errno => errno.into(),
    })
}

/// Copies a container's output stream to its log, and then to those who are
/// attached, until the stream ends or breaks, or `enough` says that no more of
/// it is waited for. A log that cannot be written (a full disk) loses text,
/// never blocks the container. Answers with how many bytes there were.
///
/// # Errors
/// The stream broke.
pub async fn copy(
    mut from: impl AsyncRead + Unpin,
    name: &str,
    log: Option<&Arc<LogFile>>,
    attached: &Fanout,
    enough: &CancellationToken,
) -> io::Result<u64> {
    let mut pieces = Pieces::default();
    let mut copied = 0;
    let mut buffer = vec![0u8; MAX_LINE];
    let mut entry = Vec::new();
    let mut complained = false;
    loop {
        let read = tokio::select! {
            biased;
            () = enough.cancelled() => Ok(0),
            read = from.read(&mut buffer) => read,
        };
        let length = *read.as_ref().unwrap_or(&0);
        entry.clear();
        if length == 0 {
            pieces.finish(name, &mut entry);
        } else {
            pieces.push(buffer.get(..length).unwrap_or_default(), name, &mut entry);
        }
        if let Some(log) = log
            && !entry.is_empty()
        {
            match log.write(&entry).await {
                Ok(()) => complained = false,
                Err(error) if !complained => {
                    complained = true;
                    tracing::warn!(log = %log.path.display(), %error, "failed to write a container's log: its output is lost");
                }
                Err(_) => {}
            }
        }
        if length == 0 {
            return read.map(|_| copied);
        }
        copied += length as u64;
        attached.publish(buffer.get(..length).unwrap_or_default()).await;
    }
}

/// Cuts a stream of bytes into log lines.
#[derive(Debug, Default)]
struct Pieces {
    /// Text since the last newline that has not been written.
    rest: Vec<u8>,
}

impl Pieces {
    fn push(&mut self, bytes: &[u8], name: &str, out: &mut Vec<u8>) {
        let time = Utc::now();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match part.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (part, false),
            };
            self.rest.extend_from_slice(text);
            while self.rest.len() > MAX_LINE {
                let later = self.rest.split_off(MAX_LINE);
                line(out, &time, name, b'P', &self.rest);
                self.rest = later;
            }
            if ends {
                line(out, &time, name, b'F', &self.rest);
                self.rest.clear();
            }
        }
    }

    /// The stream has ended: what is left is a line without its newline.
    fn finish(&mut self, name: &str, out: &mut Vec<u8>) {
        if !self.rest.is_empty() {
            line(out, &Utc::now(), name, b'P', &self.rest);
            self.rest.clear();
        }
    }
}

fn line(out: &mut Vec<u8>, time: &chrono::DateTime<Utc>, name: &str, tag: u8, text: &[u8]) {
    out.extend_from_slice(time.to_rfc3339_opts(SecondsFormat::Nanos, true).as_bytes());
    out.push(b' ');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&[b' ', tag, b' ']);
    out.extend_from_slice(text);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]

    use std::pin::Pin;
    use std::task::{Context, Poll};

    use proptest::prelude::*;
    use tokio::io::ReadBuf;

    use super::*;

    async fn copied(from: impl AsyncRead + Unpin, log: &Arc<LogFile>) -> io::Result<u64> {
        copy(from, "stdout", Some(log), &Fanout::default(), &CancellationToken::new()).await
    }

    async fn logged(bytes: &[u8]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/0.log");
        let log = Arc::new(LogFile::open(folder.path(), &path).unwrap());
        copied(bytes, &log).await.unwrap();
        std::fs::read_to_string(path).unwrap().lines().map(|line| line[31..].to_owned()).collect()
    }

    #[tokio::test]
    async fn whole_lines_are_full_and_a_last_piece_is_partial() {
        assert_eq!(logged(b"one\n\ntwo").await, ["stdout F one", "stdout F ", "stdout P two"]);
        assert!(logged(b"").await.is_empty());
    }

    #[tokio::test]
    async fn a_long_line_comes_in_pieces() {
        let text = "x".repeat(MAX_LINE * 2 + 3);
        let lines = logged(format!("{text}\n").as_bytes()).await;
        let sizes: Vec<_> = lines.iter().map(|line| (&line[7..8], line.len() - 9)).collect();
        assert_eq!(sizes, [("P", MAX_LINE), ("P", MAX_LINE), ("F", 3)]);
    }

    #[tokio::test]
    async fn after_rotation_the_log_goes_on_in_a_new_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let log = Arc::new(LogFile::open(folder.path(), &path).unwrap());
        copied(&b"old\n"[..], &log).await.unwrap();
        std::fs::rename(&path, folder.path().join("0.log.1")).unwrap();
        log.reopen().unwrap();
        copied(&b"new\n"[..], &log).await.unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("stdout F new\n"));
        assert!(std::fs::read_to_string(folder.path().join("0.log.1")).unwrap().ends_with("stdout F old\n"));
    }

    #[tokio::test]
    async fn no_link_below_the_folder_leads_away() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        let (folder, away) = (root.path().join("logs"), root.path().join("away"));
        std::fs::create_dir_all(folder.join("c")).unwrap();
        std::fs::create_dir(&away).unwrap();
        symlink(&away, folder.join("dir")).unwrap();
        symlink(away.join("file"), folder.join("c/0.log")).unwrap();
        for path in ["dir/0.log", "c/0.log"] {
            let error = LogFile::open(&folder, &folder.join(path)).unwrap_err().to_string();
            assert!(error.contains("symbolic link"), "{error}");
        }
        assert_eq!(std::fs::read_dir(&away).unwrap().count(), 0);
        // Nor does one that takes the place of a log that is to be reopened.
        let log = Arc::new(LogFile::open(&folder, &folder.join("c/1.log")).unwrap());
        std::fs::rename(folder.join("c/1.log"), folder.join("c/1.log.old")).unwrap();
        symlink(away.join("file"), folder.join("c/1.log")).unwrap();
        log.reopen().unwrap_err();
        log.write(b"still here").await.unwrap();
        assert_eq!(std::fs::read(folder.join("c/1.log.old")).unwrap(), b"still here");
        assert_eq!(std::fs::read_dir(&away).unwrap().count(), 0);
        // A folder that the node itself leads elsewhere is fine.
        let linked = root.path().join("linked");
        symlink(&folder, &linked).unwrap();
        LogFile::open(&linked, &linked.join("new/0.log")).unwrap();
        assert!(folder.join("new/0.log").is_file());
        LogFile::open(&folder, &away.join("0.log")).unwrap_err();
    }

    #[test]
    fn a_fifo_is_no_log_and_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        LogFile::open(folder.path(), &path).unwrap_err();
        let _reader = File::options().read(true).write(true).open(&path).unwrap();
        let error = LogFile::open(folder.path(), &path).unwrap_err().to_string();
        assert!(error.contains("regular file"), "{error}");
    }

    struct Broken;

    impl AsyncRead for Broken {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
        }
    }

    #[tokio::test]
    async fn what_breaks_off_is_logged_to_its_last_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let log = Arc::new(LogFile::open(folder.path(), &path).unwrap());
        assert!(copied(AsyncReadExt::chain(&b"one\ntwo"[..], Broken), &log).await.is_err());
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("stdout P two\n"));
    }

    #[tokio::test]
    async fn a_log_that_does_not_answer_holds_up_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let mut log = LogFile::open(folder.path(), &path).unwrap();
        log.is_local = AtomicBool::new(false);
        log.lane = Lane::new(2, Duration::from_millis(100));
        let log = Arc::new(log);
        // A write takes as long as somebody else has the file.
        let (holder, until) = std::sync::mpsc::channel::<()>();
        let (has, taken) = std::sync::mpsc::channel();
        let held = log.clone();
        let server = std::thread::spawn(move || {
            let _file = lock(&held.file);
            has.send(()).unwrap();
            let _ = until.recv();
        });
        taken.recv().unwrap();
        for _ in 0..2 {
            assert_eq!(log.write(b"late\n").await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        // The container goes on, and what it says from here on is lost at once.
        copied(&[b'x'; 1 << 20][..], &log).await.unwrap();
        drop(holder);
        server.join().unwrap();
        while log.write(b"again\n").await.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "late\nlate\nagain\n");
    }

    proptest! {
        /// However the bytes arrive, the log holds all of them, in lines of bounded length.
        #[test]
        fn no_byte_is_lost(chunks in proptest::collection::vec(proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..40_000), 0..4)) {
            let mut pieces = Pieces::default();
            let mut out = Vec::new();
            for chunk in &chunks {
                pieces.push(chunk, "stderr", &mut out);
            }
            pieces.finish("stderr", &mut out);
            let mut text = Vec::new();
            for line in out.split_inclusive(|byte| *byte == b'\n') {
                let line = &line[31..line.len() - 1];
                prop_assert!(line.len() <= MAX_LINE + 9);
                text.extend_from_slice(&line[9..]);
                if line[7] == b'F' {
                    text.push(b'\n');
                }
            }
            prop_assert_eq!(text, chunks.concat());
        }
    }
}
