//! The control group of a pod, in which the kernel counts what the pod uses of its host. It
//! holds the pod's VMM, or the groups of its supervisor and its host containers.

use std::io;
use std::path::{Path, PathBuf};

use crate::crash;
use crate::id::SandboxId;

const ROOT: &str = "/sys/fs/cgroup";

/// The root of the host's control groups; `None` where the host has no cgroup v2.
#[must_use]
pub fn root() -> Option<&'static Path> {
    let root = Path::new(ROOT);
    root.join("cgroup.controllers").exists().then_some(root)
}

/// The path of a sandbox's control group that huskd makes itself: under the parent that the
/// client names, else under `/husk`. `None` where the host has no cgroup v2.
#[must_use]
pub fn path(parent: &str, id: &SandboxId) -> Option<PathBuf> {
    let root = root()?;
    let parent = if parent.is_empty() { "husk" } else { parent };
    let below = Path::new(parent)
        .components()
        .filter_map(|part| match part {
            std::path::Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect::<PathBuf>();
    Some(root.join(below).join(format!("husk-{}", id.short())))
}

/// Makes a group, and has the kernel count what is used in it. A scope of systemd must be
/// there: in its tree systemd alone makes groups, and chooses what is counted.
///
/// # Errors
/// The kernel's error, or a scope that is not there.
pub fn make(path: &Path) -> io::Result<()> {
    if path.extension().is_some_and(|extension| extension == "scope") {
        return path.metadata().map(drop);
    }
    std::fs::create_dir_all(path)?;
    crash::point("control group made");
    count(path);
    Ok(())
}

/// Turns on the controllers that count what a pod uses, or limit its containers, from the root
/// down to the group, as far as the host allows. Where a controller is missing, its counters
/// are, and the pod runs all the same.
fn count(path: &Path) {
    let parents: Vec<_> = path.ancestors().skip(1).take_while(|parent| parent.starts_with(ROOT)).collect();
    for parent in parents.into_iter().rev() {
        for controller in ["+cpu", "+memory", "+cpuset", "+io", "+pids", "+hugetlb"] {
            let _ = std::fs::write(parent.join("cgroup.subtree_control"), controller);
        }
    }
}

/// The usage of a group, in nanoseconds and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time of all threads, the guest's included.
    pub cpu_nanos: u64,
    /// The memory; `None` where the host does not count it.
    pub memory: Option<Memory>,
}

/// The memory that a group uses, bytes, and its page faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All memory of the group.
    pub current: u64,
    /// The part that the kernel takes back first.
    pub inactive_file: u64,
    /// The part that no file backs: mostly the guest's memory.
    pub anonymous: u64,
    /// All page faults.
    pub page_faults: u64,
    /// Page faults that had to wait for a disk.
    pub major_page_faults: u64,
}

/// Reads what the group at `path` has used; `None` when there is none.
#[must_use]
pub fn usage(path: &Path) -> Option<Usage> {
    let cpu = std::fs::read_to_string(path.join("cpu.stat")).ok()?;
    let current = std::fs::read_to_string(path.join("memory.current")).ok();
    let memory = current.and_then(|text| text.trim().parse().ok()).map(|current| {
        let stat = std::fs::read_to_string(path.join("memory.stat")).unwrap_or_default();
        Memory {
            current,
            inactive_file: keyed(&stat, "inactive_file"),
            anonymous: keyed(&stat, "anon"),
            page_faults: keyed(&stat, "pgfault"),
            major_page_faults: keyed(&stat, "pgmajfault"),
        }
    });
    Some(Usage { cpu_nanos: keyed(&cpu, "usage_usec").saturating_mul(1000), memory })
}

/// The value of `key` in lines of `<key> <number>`, 0 if it is not there.
fn keyed(text: &str, key: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// How many of the group's processes the kernel has killed for want of memory, the
/// group's own or that of a group above it.
#[must_use]
pub fn oom_kills(path: &Path) -> u64 {
    keyed(&std::fs::read_to_string(path.join("memory.events")).unwrap_or_default(), "oom_kill")
}

/// The lowest memory limit that holds for the group at `path`, in bytes, and the group that
/// has it: itself, or one above. `None` without a limit.
#[must_use]
pub fn memory_limit(path: &Path) -> Option<(PathBuf, u64)> {
    let limit = |group: &Path| {
        let text = std::fs::read_to_string(group.join("memory.max")).ok()?;
        Some((group.to_owned(), text.trim().parse().ok()?))
    };
    path.ancestors().filter_map(limit).min_by_key(|(_, limit)| *limit)
}

/// Has the group at `path` use the CPUs or memory nodes that `list` names;
/// `file` is `cpuset.cpus` or `cpuset.mems`. An empty list stands for all that
/// the parent has.
///
/// # Errors
/// The kernel's.
pub fn set_list(path: &Path, file: &str, list: &str) -> io::Result<()> {
    let own = path.join(file);
    if std::fs::read_to_string(&own)?.trim() == list {
        return Ok(());
    }
    if list.is_empty() {
        // A list that was set cannot be emptied again while the group has
        // processes (Linux, `kernel/cgroup/cpuset.c`, `validate_change`).
        let parents = path.parent().unwrap_or(path).join(format!("{file}.effective"));
        return std::fs::write(own, std::fs::read(parents)?);
    }
    std::fs::write(own, format!("{list}\n"))
}

/// Gives every process of the group at `path` this OOM score (`oom_score_adj` of
/// proc(5)): a VMM and a file server. A process that has ended is passed over.
///
/// # Errors
/// The kernel's error, for a score that huskd may not lower to.
pub fn set_oom_score(path: &Path, score: i64) -> io::Result<()> {
    let processes = std::fs::read_to_string(path.join("cgroup.procs"))?;
    for process in processes.split_whitespace() {
        match std::fs::write(format!("/proc/{process}/oom_score_adj"), score.to_string()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // The process ended after the file was opened.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Removes a group, after the groups below it. The kernel's files in it are no obstacle.
fn remove_tree(path: &Path) -> io::Result<()> {
    let mut groups = vec![path.to_owned()];
    let mut at = 0;
    while let Some(group) = groups.get(at).cloned() {
        at += 1;
        let entries = std::fs::read_dir(&group)?;
        let inner = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        groups.extend(inner.map(|entry| entry.path()));
    }
    for group in groups.iter().rev() {
        match std::fs::remove_dir(group) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Kills every process in a group and in the groups below. So a VMM that does not listen any
/// more can be ended without a process id, which may have become another's. Succeeds without
/// the group.
///
/// # Errors
/// The kernel's error.
pub fn kill(path: &Path) -> io::Result<()> {
    match std::fs::write(path.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether there are processes in a group or in the groups below.
#[must_use]
pub fn is_populated(path: &Path) -> bool {
    let events = std::fs::read_to_string(path.join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "populated 1")
}

/// Removes a group, with the groups of containers below, once it is empty,
/// which takes the kernel a moment after the last process has ended. Succeeds
/// without the group.
///
/// # Errors
/// The kernel's error, `EBUSY` when a process stays in the group.
pub async fn remove(path: &Path) -> io::Result<()> {
    crash::point("control group to be removed");
    let mut tries = 0;
    loop {
        match remove_tree(path) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) if tries >= 100 => return Err(error),
            Err(_) => {
                tries += 1;
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    }
    // The parent that all such groups share is removed with the last of them; while
    // there are others this fails, as it should.
    if let Some(parent) = path.parent()
        && parent == Path::new(ROOT).join("husk")
    {
        let _ = std::fs::remove_dir(parent);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_without_the_memory_controller_still_tells_processor_time() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(usage(folder.path()), None);
        std::fs::write(folder.path().join("cpu.stat"), "usage_usec 7\nuser_usec 5\n").unwrap();
        assert_eq!(usage(folder.path()), Some(Usage { cpu_nanos: 7000, memory: None }));
        std::fs::write(folder.path().join("memory.current"), "4096\n").unwrap();
        std::fs::write(folder.path().join("memory.stat"), "anon 3\npgfault 2\n").unwrap();
        let memory = Memory { current: 4096, anonymous: 3, page_faults: 2, ..Memory::default() };
        assert_eq!(usage(folder.path()), Some(Usage { cpu_nanos: 7000, memory: Some(memory) }));
    }

    #[test]
    fn a_scope_is_made_by_nobody_but_systemd() {
        let folder = tempfile::tempdir().unwrap();
        let scope = folder.path().join("a.slice/husk-1.scope");
        assert_eq!(make(&scope).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::create_dir_all(&scope).unwrap();
        make(&scope).unwrap();
        assert!(!folder.path().join("cgroup.subtree_control").exists());
    }

    #[test]
    fn the_lowest_memory_limit_of_a_group_and_those_above_counts() {
        let folder = tempfile::tempdir().unwrap();
        let (pods, pod) = (folder.path().join("pods"), folder.path().join("pods/pod"));
        std::fs::create_dir_all(&pod).unwrap();
        // A group that is not made yet has those above.
        let own = pod.join("husk-1");
        assert_eq!(memory_limit(&own), None);
        std::fs::write(pods.join("memory.max"), "4096\n").unwrap();
        std::fs::write(pod.join("memory.max"), "max\n").unwrap();
        assert_eq!(memory_limit(&own), Some((pods, 4096)));
        std::fs::write(pod.join("memory.max"), "1024\n").unwrap();
        assert_eq!(memory_limit(&own), Some((pod, 1024)));
    }

    #[test]
    fn every_process_of_a_group_has_its_score() {
        let folder = tempfile::tempdir().unwrap();
        let mut processes =
            [0, 1].map(|_| std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap());
        // The last process has ended meanwhile.
        let listed = format!("{}\n4194399\n{}\n", processes[0].id(), processes[1].id());
        std::fs::write(folder.path().join("cgroup.procs"), listed).unwrap();
        let set = set_oom_score(folder.path(), 321);
        for process in &mut processes {
            let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", process.id())).unwrap();
            process.kill().unwrap();
            process.wait().unwrap();
            assert_eq!(score, "321\n");
        }
        set.unwrap();
    }
}
