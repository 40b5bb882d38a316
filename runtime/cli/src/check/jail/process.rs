//! A process as `/proc` shows it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The properties of one thread, as in `/proc/PID/task/TID/status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thread {
    /// Real, effective, saved and file system user.
    pub uids: Vec<u32>,
    /// The same of its group.
    pub gids: Vec<u32>,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Capabilities that it has, or could give itself: effective, permitted, inheritable
    /// and ambient.
    pub capabilities: u64,
    /// Capabilities that a program which it starts could give it.
    pub bounding: u64,
    /// Whether no program that it starts gives it new privileges.
    pub no_new_privs: bool,
    /// The seccomp mode: 2 for a filter.
    pub seccomp: u32,
}

/// A mount of the process's namespace: its place and its flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is.
    pub place: String,
    /// Whether it is read-only.
    pub read_only: bool,
}

/// A process.
#[derive(Clone, Debug, Default)]
pub struct Process {
    /// The process's start time, clock ticks since the host's boot.
    pub began: u64,
    /// The process's threads.
    pub threads: Vec<Thread>,
    /// Kinds of namespaces that it shares with this very process, which is in the host's.
    pub shared_namespaces: Vec<&'static str>,
    /// All mounts that it sees.
    pub mounts: Vec<Mount>,
    /// The process's control group, from the root of the hierarchy.
    pub cgroup: PathBuf,
    /// Hard resource limits by their names in `/proc/PID/limits`; `None` for no limit.
    pub limits: BTreeMap<String, Option<u64>>,
    /// How many files it has open.
    pub open_files: usize,
    /// Directories that it has open.
    pub open_directories: Vec<PathBuf>,
    /// How early the kernel ends it when memory runs out: -1000 for never.
    pub oom_score: i32,
    /// Whether its files in `/proc` belong to its user: then others of that user may trace it,
    /// and it leaves core files.
    pub dumpable: bool,
}

/// Kinds of namespaces that a jailed process has for itself.
const NAMESPACES: [&str; 2] = ["mnt", "pid"];

impl Process {
    /// Reads all of it.
    ///
    /// # Errors
    /// There is no such process, or the caller is not root.
    pub fn read(pid: u32) -> io::Result<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let text = |name: &str| fs::read_to_string(folder.join(name));
        let mut threads = Vec::new();
        for task in fs::read_dir(folder.join("task"))? {
            match fs::read_to_string(task?.path().join("status")) {
                Ok(status) => threads.push(thread(&status)),
                // The thread has ended meanwhile.
                Err(error) if has_ended(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let mut shared_namespaces = Vec::new();
        for kind in NAMESPACES {
            if fs::read_link(folder.join("ns").join(kind))? == fs::read_link(format!("/proc/self/ns/{kind}"))?
            {
                shared_namespaces.push(kind);
            }
        }
        let (open_files, open_directories) = open(&folder)?;
        let user = threads.first().and_then(|thread| thread.uids.get(1).copied());
        Ok(Self {
            began: husk_base::start_time(&text("stat")?).ok_or(io::ErrorKind::InvalidData)?,
            shared_namespaces,
            mounts: mounts(&text("mountinfo")?),
            cgroup: cgroup(&text("cgroup")?),
            limits: limits(&text("limits")?),
            open_files,
            open_directories,
            oom_score: text("oom_score_adj")?.trim().parse().map_err(io::Error::other)?,
            dumpable: user == Some(fs::metadata(folder.join("environ"))?.uid()),
            threads,
        })
    }
}

/// Whether an error means that a process or thread is no more.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn open(folder: &Path) -> io::Result<(usize, Vec<PathBuf>)> {
    let (mut count, mut directories) = (0, Vec::new());
    for entry in fs::read_dir(folder.join("fd"))? {
        let path = entry?.path();
        count += 1;
        if fs::metadata(&path).is_ok_and(|file| file.is_dir()) {
            directories.push(fs::read_link(&path).unwrap_or(path));
        }
    }
    Ok((count, directories))
}

fn thread(status: &str) -> Thread {
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    let numbers = |name: &str| line(name).split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // A set that cannot be read counts as full.
    let set = |name: &str| u64::from_str_radix(line(name).trim(), 16).unwrap_or(u64::MAX);
    Thread {
        uids: numbers("Uid:"),
        gids: numbers("Gid:"),
        groups: numbers("Groups:"),
        capabilities: ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"]
            .map(set)
            .into_iter()
            .fold(0, |all, one| all | one),
        bounding: set("CapBnd:"),
        no_new_privs: line("NoNewPrivs:").trim() == "1",
        seccomp: line("Seccomp:").trim().parse().unwrap_or(0),
    }
}

fn mounts(mountinfo: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let mut fields = line.split(' ').skip(4);
        let (place, options) = (fields.next()?, fields.next()?);
        Some(Mount { place: place.to_owned(), read_only: options.split(',').any(|option| option == "ro") })
    };
    mountinfo.lines().filter_map(mount).collect()
}

fn cgroup(text: &str) -> PathBuf {
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").into()
}

fn limits(text: &str) -> BTreeMap<String, Option<u64>> {
    let limit = |line: &str| {
        // The name is padded to 26 columns; the soft limit and then the hard one follow.
        let (name, values) = line.split_at_checked(26)?;
        let hard = values.split_whitespace().nth(1)?;
        Some((name.trim().to_owned(), hard.parse().ok()))
    };
    text.lines().skip(1).filter_map(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_read() {
        let me = Process::read(std::process::id()).unwrap();
        assert!(me.began > 0 && !me.threads.is_empty() && !me.mounts.is_empty() && me.open_files > 2);
        assert_eq!(me.threads[0].uids.len(), 4);
        let open_files =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap().1;
        assert_eq!(me.limits["Max open files"].unwrap_or(u64::MAX), open_files);
        assert!(Process::read(0).is_err());
    }

    #[test]
    fn a_directory_that_is_open_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let _open = fs::File::open(folder.path()).unwrap();
        let me = Process::read(std::process::id()).unwrap();
        assert!(me.open_directories.iter().any(|path| path == folder.path()), "{:?}", me.open_directories);
    }

    #[test]
    fn a_status_that_does_not_read_has_every_privilege() {
        let nothing = thread("Name:\tx\n");
        assert_eq!((nothing.capabilities, nothing.bounding), (u64::MAX, u64::MAX));
        assert!(!nothing.no_new_privs && nothing.seccomp == 0);
    }

    #[test]
    fn a_mount_has_its_own_flags() {
        let text = "1 0 0:5 / / ro,nosuid - tmpfs husk rw\n2 1 8:1 /a /v0 rw,relatime - ext4 /dev/sda ro\n";
        let expected = [("/", true), ("/v0", false)];
        assert_eq!(mounts(text), expected.map(|(place, read_only)| Mount { place: place.into(), read_only }));
    }
}
