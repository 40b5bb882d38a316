//! Control groups, version 2 (Linux `Documentation/admin-guide/cgroup-v2.rst`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

/// The mount point of the hierarchy.
pub const ROOT: &str = "/sys/fs/cgroup";

/// The agent's own cgroup. The root must have no processes before its
/// controllers can be enabled for the cgroups below it.
pub const AGENT: &str = "/sys/fs/cgroup/husk-agent";

/// Most cgroups below a container's own that are searched when all its
/// processes get a signal. The container may have made any number.
const MAX_DESCENDANTS: usize = 1024;

/// Moves the agent into its cgroup, and enables every controller for the other
/// cgroups.
pub fn delegate_controllers() -> io::Result<()> {
    fs::create_dir_all(AGENT)?;
    fs::write(Path::new(AGENT).join("cgroup.procs"), "0")?;
    let available = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"))?;
    let enable: Vec<String> = available.split_whitespace().map(|name| format!("+{name}")).collect();
    fs::write(Path::new(ROOT).join("cgroup.subtree_control"), enable.join(" "))
}

/// The cgroup of a container.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

/// A container's use of resources, in bytes and nanoseconds, with the kernel's
/// names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// `cpu.stat`: processor time since the start.
    pub cpu_nanos: u64,
    /// The part of that time spent in user mode.
    pub cpu_user_nanos: u64,
    /// The part of that time spent in the kernel.
    pub cpu_system_nanos: u64,
    /// `nr_periods` of `cpu.stat`.
    pub periods: u64,
    /// `nr_throttled` of `cpu.stat`.
    pub throttled_periods: u64,
    /// `throttled_usec` of `cpu.stat`.
    pub throttled_nanos: u64,
    /// `memory.current`: bytes in use.
    pub memory: u64,
    /// `memory.max`; 0 for no limit.
    pub memory_limit: u64,
    /// `memory.peak`: most bytes ever in use.
    pub memory_peak: u64,
    /// `memory.stat`: anonymous memory.
    pub anonymous: u64,
    /// `file` of `memory.stat`.
    pub file: u64,
    /// `file_mapped` of `memory.stat`.
    pub mapped_file: u64,
    /// `active_file` of `memory.stat`.
    pub active_file: u64,
    /// `inactive_file` of `memory.stat`: the memory that the kernel reclaims
    /// first.
    pub inactive_file: u64,
    /// `kernel` of `memory.stat`.
    pub kernel: u64,
    /// `pgfault` of `memory.stat`.
    pub page_faults: u64,
    /// `pgmajfault` of `memory.stat`.
    pub major_page_faults: u64,
    /// `memory.swap.current`: bytes of swap in use.
    pub swap: u64,
    /// `memory.events`: processes killed because memory ran out.
    pub oom_kills: u64,
    /// `pids.current`: processes and threads.
    pub pids: u64,
    /// `pids.max`; 0 for no limit.
    pub pids_limit: u64,
    /// Processes, without counting threads.
    pub processes: u64,
    /// `io.stat`, summed over all devices.
    pub io: Io,
}

/// Reads and writes of block devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Io {
    /// `rbytes` of `io.stat`.
    pub read_bytes: u64,
    /// `wbytes` of `io.stat`.
    pub write_bytes: u64,
    /// `rios` of `io.stat`.
    pub reads: u64,
    /// `wios` of `io.stat`.
    pub writes: u64,
}

impl Cgroup {
    /// The cgroup that an OCI configuration names in `cgroupsPath`. `None` for
    /// a path that leads out of the root.
    pub fn from_oci_path(path: &str) -> Option<Self> {
        let relative = path.strip_prefix('/')?;
        let legal = |part: &str| !matches!(part, "" | "." | "..") && !part.contains([':', '\0']);
        relative.split('/').all(legal).then(|| Self(Path::new(ROOT).join(relative)))
    }

    /// A directory in place of a cgroup.
    #[cfg(test)]
    pub fn at(directory: &Path) -> Self {
        Self(directory.to_owned())
    }

    /// Kills every process in the cgroup, in one step that no fork escapes.
    pub fn kill(&self) {
        match fs::write(self.0.join("cgroup.kill"), "1") {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(cgroup = %self.0.display(), %error, "failed to kill processes"),
        }
    }

    /// Sends a signal to every process in the cgroup.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        if signal == libc::SIGKILL {
            self.kill();
            return Ok(());
        }
        for pid in self.processes()? {
            // SAFETY: kill has no memory effects.
            match Errno::result(unsafe { libc::kill(pid, signal) }) {
                Ok(_) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn processes(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        let mut to_visit = vec![self.0.clone()];
        let mut visited = 0;
        while let Some(directory) = to_visit.pop() {
            visited += 1;
            if visited > MAX_DESCENDANTS {
                break;
            }
            // Child cgroups may vanish meanwhile, and a threaded one has no
            // list.
            if let Ok(list) = fs::read_to_string(directory.join("cgroup.procs")) {
                // 0 stands for a process outside of our pid namespace; for
                // kill(2) it would mean our own process group.
                pids.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
            }
            let children = fs::read_dir(&directory).into_iter().flatten().flatten();
            to_visit.extend(
                children
                    .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                    .map(|entry| entry.path()),
            );
        }
        Ok(pids)
    }

    /// How many processes of the cgroup the kernel has killed because memory
    /// ran out.
    pub fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
        keyed(&events, "oom_kill").unwrap_or(0)
    }

    /// Sets the OOM score of every process in the cgroup. A process that has
    /// just ended is no error.
    pub fn set_oom_score_adj(&self, score: i32) -> io::Result<()> {
        for pid in self.processes()? {
            match fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Reads the current usage. A file that the kernel was built without counts
    /// as 0.
    pub fn usage(&self) -> Usage {
        let read = |name: &str| fs::read_to_string(self.0.join(name)).unwrap_or_default();
        let number = |name: &str| read(name).trim().parse().unwrap_or(0);
        let (memory, cpu) = (read("memory.stat"), read("cpu.stat"));
        let memory_stat = |key| keyed(&memory, key).unwrap_or(0);
        let cpu_stat = |key| keyed(&cpu, key).unwrap_or(0);
        let cpu_nanos = |key| cpu_stat(key).saturating_mul(1000);
        Usage {
            cpu_nanos: cpu_nanos("usage_usec"),
            cpu_user_nanos: cpu_nanos("user_usec"),
            cpu_system_nanos: cpu_nanos("system_usec"),
            periods: cpu_stat("nr_periods"),
            throttled_periods: cpu_stat("nr_throttled"),
            throttled_nanos: cpu_nanos("throttled_usec"),
            memory: number("memory.current"),
            // "max" is not a number.
            memory_limit: number("memory.max"),
            memory_peak: number("memory.peak"),
            anonymous: memory_stat("anon"),
            file: memory_stat("file"),
            mapped_file: memory_stat("file_mapped"),
            active_file: memory_stat("active_file"),
            inactive_file: memory_stat("inactive_file"),
            kernel: memory_stat("kernel"),
            page_faults: memory_stat("pgfault"),
            major_page_faults: memory_stat("pgmajfault"),
            swap: number("memory.swap.current"),
            oom_kills: self.oom_kills(),
            pids: number("pids.current"),
            pids_limit: number("pids.max"),
            processes: self.processes().map_or(0, |pids| pids.len() as u64),
            io: io_stat(&read("io.stat")),
        }
    }
}

/// Adds up `io.stat`: lines of `<major>:<minor> <key>=<number>...`.
fn io_stat(text: &str) -> Io {
    let mut io = Io::default();
    for (key, value) in text.split_whitespace().filter_map(|word| word.split_once('=')) {
        let value = value.parse::<u64>().unwrap_or(0);
        let total = match key {
            "rbytes" => &mut io.read_bytes,
            "wbytes" => &mut io.write_bytes,
            "rios" => &mut io.reads,
            "wios" => &mut io.writes,
            _ => continue,
        };
        *total = total.saturating_add(value);
    }
    io
}

/// The value of `key` in a flat keyed file: lines of `<key> <number>`.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_keyed_file_is_read_by_whole_keys() {
        let text = "low 0\noom_kill_disable 7\noom 1\noom_kill 2\n";
        assert_eq!(keyed(text, "oom_kill"), Some(2));
        assert_eq!(keyed(text, "oom"), Some(1));
        assert_eq!(keyed(text, "kill"), None);
        assert_eq!(keyed("oom_kill many\n", "oom_kill"), None);
    }

    #[test]
    fn cgroup_paths_stay_below_the_root() {
        assert_eq!(Cgroup::from_oci_path("/pod/abc").unwrap().0, Path::new("/sys/fs/cgroup/pod/abc"));
        for path in ["", "/", "relative", "/a/../..", "/a//b", "system.slice:husk:abc", "/."] {
            assert!(Cgroup::from_oci_path(path).is_none(), "{path}");
        }
    }

    #[test]
    fn usage_is_read_from_the_files_that_are_there() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write(
            "cpu.stat",
            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 4\nnr_throttled 2\nthrottled_usec 3\n",
        );
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("memory.stat", "anon 100\nfile 5\ninactive_file 7\npgfault 9\npgmajfault 1\n");
        write("memory.events", "oom 0\noom_kill 3\n");
        write("pids.max", "20\n");
        write("cgroup.procs", "7\n8\n");
        write(
            "io.stat",
            "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n254:16 rbytes=5 wbytes=x\n",
        );
        let cgroup = Cgroup(directory.path().to_owned());
        assert_eq!(
            cgroup.usage(),
            Usage {
                cpu_nanos: 1_500_000,
                cpu_user_nanos: 1_000_000,
                cpu_system_nanos: 500_000,
                periods: 4,
                throttled_periods: 2,
                throttled_nanos: 3000,
                memory: 4096,
                inactive_file: 7,
                anonymous: 100,
                file: 5,
                page_faults: 9,
                major_page_faults: 1,
                oom_kills: 3,
                pids_limit: 20,
                processes: 2,
                io: Io { read_bytes: 15, write_bytes: 20, reads: 1, writes: 2 },
                ..Usage::default()
            }
        );
        assert_eq!(cgroup.oom_kills(), 3);
    }
}
