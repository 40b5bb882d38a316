//! Container logs in the CRI format: a line each of
//! `<RFC 3339 time> <stdout|stderr> <F|P> <text>`, where `P` marks a piece of a
//! longer line and `F` its last (or only) piece.

mod copy;
mod lines;
mod position;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_base::lock;
use husk_proto::agent::stream::Kind;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

pub(crate) use self::copy::Copying;
use self::position::Position;
use crate::lane::Lane;

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
    /// Locked before `position`.
    file: Mutex<File>,
    /// How much is in it; never locked while a file system is waited for that is not the
    /// node's own.
    position: Mutex<Position>,
    /// Whether the file is on a file system of the node's own, on which a write does
    /// not wait for a server.
    is_local: AtomicBool,
    /// Writes to other file systems, one for each stream.
    lane: Lane,
}

impl LogFile {
    /// Opens the log at `path`, which is below the pod's log `folder`, making
    /// folders that are not there. The file `position` keeps for the next huskd how much
    /// of the output is in the log.
    ///
    /// # Errors
    /// The disk refuses it, a symbolic link is below the folder, or the log is no regular
    /// file.
    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    pub fn open(folder: &Path, path: &Path, position: Option<&Path>) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let file = append(folder, path)?;
        let is_local = is_local(&file);
        let position = Position::open(position, &file, path, is_local)?;
        Ok(Self {
            folder: folder.into(),
            path: path.into(),
            is_local: AtomicBool::new(is_local),
            file: Mutex::new(file),
            position: Mutex::new(position),
            lane: Lane::new(2, WRITE_LIMIT),
        })
    }

    /// Goes on in a new file at the same path, after log rotation has moved the
    /// old one away.
    ///
    /// # Errors
    /// As [`LogFile::open`]; the old file stays in use then.
    pub fn reopen(&self) -> io::Result<()> {
        let new = append(&self.folder, &self.path)?;
        let mut file = lock(&self.file);
        lock(&self.position).moved(&new)?;
        self.is_local.store(is_local(&new), Ordering::Relaxed);
        *file = new;
        Ok(())
    }

    /// How much of a stream is in the log, as far as the log and its position tell.
    pub(crate) fn taken(&self, kind: Kind) -> u64 {
        lock(&self.position).taken(kind)
    }

    /// The next entry begins at the byte `start` of a stream.
    pub(crate) fn begin(&self, kind: Kind, start: u64) {
        let mut position = lock(&self.position);
        if position.taken(kind) != start {
            position.advance(kind, start, 0);
            position.record();
        }
    }

    /// Appends `entry` to the log, which has a stream up to the byte `upto` then: at once
    /// on the node's own disks, so that nothing comes between the read of a container's
    /// output and this; else on a thread of its own, in bounded time.
    async fn write(self: &Arc<Self>, entry: &[u8], kind: Kind, upto: u64) -> io::Result<()> {
        if self.is_local.load(Ordering::Relaxed) {
            return self.write_local(entry, kind, upto);
        }
        let (log, bytes) = (self.clone(), entry.to_vec());
        let written = self.lane.run_now(move || lock(&log.file).write_all(&bytes)).await;
        let mut position = lock(&self.position);
        position.advance(kind, upto, entry.len());
        // The lines of such a log are not asked when it is taken over.
        position.record();
        written.map_err(|why| io::Error::new(io::ErrorKind::TimedOut, why))?
    }

    fn write_local(&self, entry: &[u8], kind: Kind, upto: u64) -> io::Result<()> {
        let mut file = lock(&self.file);
        let written = file.write_all(entry);
        let mut position = lock(&self.position);
        if written.is_ok() {
            position.advance(kind, upto, entry.len());
            return Ok(());
        }
        // No line is left without its end, and what could not be written is lost.
        if file.metadata()?.len() > position.length() {
            let _ = file.set_len(position.length());
        }
        position.advance(kind, upto, 0);
        position.moved(&file)?;
        written
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
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY;
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

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]

    use std::pin::Pin;
    use std::task::{Context, Poll};

    use std::time::Duration;

    use tokio::io::{AsyncRead, AsyncReadExt, DuplexStream, ReadBuf};
    use tokio_util::sync::CancellationToken;

    use super::lines::MAX_LINE;
    use super::*;
    use crate::model::fanout::Fanout;

    const STDOUT: Kind = Kind::Stdout;

    async fn copied(from: impl AsyncRead + Unpin, log: &Arc<LogFile>) -> io::Result<()> {
        let (attached, enough) = (&Fanout::default(), &CancellationToken::new());
        let copying = Copying { kind: STDOUT, log: Some(log), attached, enough };
        copying.run(from, None::<DuplexStream>, 0).await.1
    }

    async fn logged(bytes: &[u8]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/0.log");
        let log = Arc::new(LogFile::open(folder.path(), &path, None).unwrap());
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
        let log = Arc::new(LogFile::open(folder.path(), &path, None).unwrap());
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
            let error = LogFile::open(&folder, &folder.join(path), None).unwrap_err().to_string();
            assert!(error.contains("symbolic link"), "{error}");
        }
        assert_eq!(std::fs::read_dir(&away).unwrap().count(), 0);
        // Nor does one that takes the place of a log that is to be reopened.
        let log = Arc::new(LogFile::open(&folder, &folder.join("c/1.log"), None).unwrap());
        std::fs::rename(folder.join("c/1.log"), folder.join("c/1.log.old")).unwrap();
        symlink(away.join("file"), folder.join("c/1.log")).unwrap();
        log.reopen().unwrap_err();
        log.write(b"still here", STDOUT, 1).await.unwrap();
        assert_eq!(std::fs::read(folder.join("c/1.log.old")).unwrap(), b"still here");
        assert_eq!(std::fs::read_dir(&away).unwrap().count(), 0);
        // A folder that the node itself leads elsewhere is fine.
        let linked = root.path().join("linked");
        symlink(&folder, &linked).unwrap();
        LogFile::open(&linked, &linked.join("new/0.log"), None).unwrap();
        assert!(folder.join("new/0.log").is_file());
        LogFile::open(&folder, &away.join("0.log"), None).unwrap_err();
    }

    #[test]
    fn a_fifo_is_no_log_and_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        LogFile::open(folder.path(), &path, None).unwrap_err();
        let _reader = File::options().read(true).write(true).open(&path).unwrap();
        let error = LogFile::open(folder.path(), &path, None).unwrap_err().to_string();
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
        let log = Arc::new(LogFile::open(folder.path(), &path, None).unwrap());
        assert!(copied(AsyncReadExt::chain(&b"one\ntwo"[..], Broken), &log).await.is_err());
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("stdout P two\n"));
    }

    #[tokio::test]
    async fn a_log_that_does_not_answer_holds_up_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let mut log = LogFile::open(folder.path(), &path, None).unwrap();
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
            assert_eq!(log.write(b"late\n", STDOUT, 1).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        // The container goes on, and what it says from here on is lost at once.
        copied(&[b'x'; 1 << 20][..], &log).await.unwrap();
        drop(holder);
        server.join().unwrap();
        while log.write(b"again\n", STDOUT, 1).await.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "late\nlate\nagain\n");
    }

    /// A log of which a huskd wrote `entries` and died, and how much the next one finds.
    fn found(entries: &[&[u8]], torn: &[u8], between: impl FnOnce(&Path)) -> (LogFile, PathBuf) {
        let folder = tempfile::tempdir().unwrap().keep();
        let (path, position) = (folder.join("0.log"), folder.join("position"));
        std::fs::write(&path, b"2026 stdout F of another container\n").unwrap();
        let log = LogFile::open(&folder, &path, Some(&position)).unwrap();
        let mut upto = 0;
        for entry in entries {
            let text = entry.splitn(4, |byte| *byte == b' ').nth(3).unwrap();
            upto += text.len() as u64;
            log.write_local(entry, STDOUT, upto).unwrap();
        }
        std::fs::File::options().append(true).open(&path).unwrap().write_all(torn).unwrap();
        drop(log);
        between(&path);
        (LogFile::open(&folder, &path, Some(&position)).unwrap(), path)
    }

    #[test]
    fn the_next_huskd_finds_how_much_is_in_the_log() {
        let long = [b"2026 stdout F ".as_slice(), &[b'x'; 100_000], b"\n"].concat();
        let (log, path) = found(
            &[b"2026 stdout F one\n", &long, &long, &long, b"2026 stdout F two\n"],
            b"2026 stdo",
            |_| (),
        );
        assert_eq!((log.taken(STDOUT), log.taken(Kind::Stderr)), (300_011, 0));
        assert!(std::fs::read_to_string(path).unwrap().ends_with("\n2026 stdout F two\n"));
    }

    #[test]
    fn the_next_huskd_finds_how_much_is_in_a_log_that_was_rotated() {
        let rotate = |path: &Path| std::fs::rename(path, path.with_extension("log.20261202-021500")).unwrap();
        let (log, path) = found(&[b"2026 stdout F one\n"], b"2026 stdout F tw", rotate);
        assert_eq!(log.taken(STDOUT), 4);
        let rotated = std::fs::read_to_string(path.with_extension("log.20261202-021500")).unwrap();
        assert!(rotated.ends_with("\n2026 stdout F one\n") && std::fs::read(&path).unwrap().is_empty());
        // Later lines are in the new one.
        log.write_local(b"2026 stdout F two\n", STDOUT, 8).unwrap();
        drop(log);
        let log =
            LogFile::open(path.parent().unwrap(), &path, Some(&path.with_file_name("position"))).unwrap();
        assert_eq!(log.taken(STDOUT), 8);
    }

    #[test]
    fn a_log_that_somebody_has_cut_or_a_position_that_is_damaged_is_no_reason_to_fail() {
        let cut = |path: &Path| std::fs::write(path, b"").unwrap();
        assert_eq!(found(&[b"2026 stdout F one\n"], b"", cut).0.taken(STDOUT), 0);
        let damage = |path: &Path| std::fs::write(path.with_file_name("position"), b"{\"x").unwrap();
        assert_eq!(found(&[b"2026 stdout F one\n"], b"", damage).0.taken(STDOUT), 0);
    }
}
