//! Which walls there are, and when each holds.

use std::fmt::Write;
use std::path::Path;

use super::process::{Process, Thread};

/// The capabilities of a file server: to own, read, write and change any file, as the users
/// and groups that a guest names (capabilities(7)).
const FILES: [(&str, u32); 8] = [
    ("CHOWN", 0),
    ("DAC_OVERRIDE", 1),
    ("FOWNER", 3),
    ("FSETID", 4),
    ("SETGID", 6),
    ("SETUID", 7),
    ("MKNOD", 27),
    ("SETFCAP", 31),
];

/// Most files that a VMM may have open.
const VMM_FILES: u64 = 4096;

/// A process with this score or a lower one outlives the node's own services.
const UNTOUCHABLE: i32 = -999;

const HOLDS: &str = "holds";
const BROKEN: &str = "does not hold";

/// A wall around a process: what holds, or why it does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wall {
    process: &'static str,
    name: &'static str,
    state: Result<String, String>,
}

impl Wall {
    /// A wall that does not hold.
    pub const fn broken(process: &'static str, name: &'static str, why: String) -> Self {
        Self { process, name, state: Err(why) }
    }

    /// Whether it holds.
    pub const fn holds(&self) -> bool {
        self.state.is_ok()
    }
}

/// The walls, a line each.
pub fn table(walls: &[Wall]) -> String {
    let mut text = String::new();
    for wall in walls {
        let (state, detail) = match &wall.state {
            Ok(detail) => (HOLDS, detail.clone()),
            Err(why) => (BROKEN, why.clone()),
        };
        let _ = writeln!(text, "{:<8}  {:<16}  {state:<13}  {detail}", wall.process, wall.name);
    }
    text
}

type State = Result<String, String>;

/// The walls around a VMM that runs as `user`.
pub fn of_vmm(name: &'static str, process: &Process, user: Option<u32>, cgroup: Option<&Path>) -> Vec<Wall> {
    let own = [
        ("user", own_user(process, user)),
        ("capabilities", no_capabilities(process)),
        ("root directory", empty_root(process)),
        ("core dumps", not_dumpable(process)),
        (
            "resource limits",
            at_most(
                process,
                &[
                    ("Max file size", u64::MAX),
                    ("Max open files", VMM_FILES),
                    ("Max processes", u64::MAX),
                    ("Max locked memory", 0),
                    ("Max core file size", 0),
                ],
            ),
        ),
        ("open files", no_directories(process)),
    ];
    walls(name, own.into_iter().chain(of_both(process, cgroup)))
}

/// The walls around a file server.
pub fn of_file_server(name: &'static str, process: &Process, cgroup: Option<&Path>) -> Vec<Wall> {
    let limits = [("Max processes", 64), ("Max locked memory", 0), ("Max core file size", 0)];
    let own = [
        ("capabilities", capabilities_for_files(process)),
        ("root directory", read_only_root(process)),
        ("resource limits", at_most(process, &limits)),
    ];
    walls(name, own.into_iter().chain(of_both(process, cgroup)))
}

fn walls(process: &'static str, states: impl Iterator<Item = (&'static str, State)>) -> Vec<Wall> {
    states.map(|(name, state)| Wall { process, name, state }).collect()
}

fn of_both(process: &Process, cgroup: Option<&Path>) -> [(&'static str, State); 5] {
    let privileges =
        every_thread(process, |thread| thread.no_new_privs, "no program gives it new privileges");
    let filtered = every_thread(process, |thread| thread.seccomp == 2, "a seccomp filter");
    [
        ("new privileges", privileges),
        ("system calls", filtered),
        ("namespaces", own_namespaces(process)),
        ("control group", in_cgroup(process, cgroup)),
        ("OOM score", can_be_ended(process)),
    ]
}

fn every_thread(process: &Process, holds: impl Fn(&Thread) -> bool, what: &str) -> State {
    let (all, without) =
        (process.threads.len(), process.threads.iter().filter(|thread| !holds(thread)).count());
    match without {
        0 if all > 0 => Ok(format!("{what}, in all {all} threads")),
        _ => Err(format!("{without} of {all} threads do without: {what}")),
    }
}

fn own_user(process: &Process, user: Option<u32>) -> State {
    let Some(user) = user else { return Err("no user is recorded for the VM".into()) };
    let is_own = |thread: &Thread| {
        let all_are = |ids: &[u32]| ids.len() == 4 && ids.iter().all(|id| *id == user);
        all_are(&thread.uids) && all_are(&thread.gids) && thread.groups.is_empty()
    };
    match process.threads.iter().find(|thread| !is_own(thread)) {
        None => Ok(format!("user and group {user}, which no other VM has, and no further group")),
        Some(Thread { uids, gids, groups, .. }) => {
            Err(format!("a thread has users {uids:?}, groups {gids:?} and {groups:?}, not {user} alone"))
        }
    }
}

fn no_capabilities(process: &Process) -> State {
    match process.threads.iter().find(|thread| thread.capabilities != 0) {
        None => Ok("none".into()),
        Some(thread) => Err(format!("a thread has {:#x}", thread.capabilities)),
    }
}

fn capabilities_for_files(process: &Process) -> State {
    let allowed = FILES.iter().fold(0, |all, (_, number)| all | 1u64 << number);
    let beyond = process.threads.iter().fold(0, |all, thread| all | thread.capabilities | thread.bounding);
    match beyond & !allowed {
        0 => Ok(format!("only {}", FILES.map(|(name, _)| name).join(", "))),
        beyond => Err(format!("it has, or can get, {beyond:#x} besides those for files")),
    }
}

fn own_namespaces(process: &Process) -> State {
    match process.shared_namespaces.as_slice() {
        [] => Ok("mounts and processes of its own".into()),
        shared => Err(format!("it shares the host's: {}", shared.join(", "))),
    }
}

fn empty_root(process: &Process) -> State {
    match process.mounts.as_slice() {
        [only] if only.place == "/" && only.read_only => Ok("one empty file system, read-only".into()),
        mounts => Err(format!("it sees {} mounts, or one that it can write to", mounts.len())),
    }
}

fn read_only_root(process: &Process) -> State {
    match process.mounts.iter().rfind(|mount| mount.place == "/") {
        Some(root) if root.read_only => {
            Ok(format!("read-only, with {} mounts below it", process.mounts.len().saturating_sub(1)))
        }
        Some(_) => Err("it can write to its root directory".into()),
        None => Err("it has no root directory of its own".into()),
    }
}

fn not_dumpable(process: &Process) -> State {
    if process.dumpable {
        return Err("a crash writes the guest's memory to a file".into());
    }
    Ok("none, and nobody but root traces it".into())
}

fn no_directories(process: &Process) -> State {
    match process.open_directories.first() {
        None => Ok(format!("{}, and no directory", process.open_files)),
        Some(path) => Err(format!("the directory {} is open", path.display())),
    }
}

/// Limits that are there, none above what it may be. `u64::MAX` stands for any limit.
fn at_most(process: &Process, wanted: &[(&str, u64)]) -> State {
    let mut found = Vec::new();
    for (name, most) in wanted {
        match process.limits.get(*name).copied().flatten() {
            Some(limit) if limit <= *most => found.push(format!("{name} {limit}")),
            Some(limit) => return Err(format!("{name} is {limit}, above {most}")),
            None => return Err(format!("{name} has no limit")),
        }
    }
    Ok(found.join(", "))
}

fn in_cgroup(process: &Process, wanted: Option<&Path>) -> State {
    let Some(wanted) = wanted else {
        return Err("the pod has none: its cost to the host is not limited".into());
    };
    let inside = process.cgroup.strip_prefix("/").unwrap_or(&process.cgroup);
    let is = Path::new("/sys/fs/cgroup").join(inside);
    if !is.starts_with(wanted) {
        return Err(format!("it is in {}, not in {}", is.display(), wanted.display()));
    }
    let limit = |name: &str| {
        let text = std::fs::read_to_string(wanted.join(name)).unwrap_or_default();
        format!("{name} {}", if text.is_empty() { "unknown" } else { text.trim() })
    };
    Ok(format!("{}: {}", wanted.display(), ["memory.max", "cpu.max", "pids.max"].map(limit).join(", ")))
}

fn can_be_ended(process: &Process) -> State {
    if process.oom_score <= UNTOUCHABLE {
        return Err(format!("{}: when memory runs out the node's own services end first", process.oom_score));
    }
    Ok(process.oom_score.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::process::Mount;
    use super::*;

    const USER: u32 = 0x7100_0001;

    fn jailed() -> Process {
        let thread = Thread {
            uids: vec![USER; 4],
            gids: vec![USER; 4],
            no_new_privs: true,
            seccomp: 2,
            ..Thread::default()
        };
        let limits = [
            ("Max file size", 1 << 30),
            ("Max open files", 4096),
            ("Max processes", 9),
            ("Max locked memory", 0),
            ("Max core file size", 0),
        ];
        Process {
            threads: vec![thread; 3],
            mounts: vec![Mount { place: "/".into(), read_only: true }],
            cgroup: "/kubepods/pod1".into(),
            limits: limits.map(|(name, limit)| (name.to_owned(), Some(limit))).into(),
            ..Process::default()
        }
    }

    fn broken(process: &Process) -> Vec<&'static str> {
        let walls = of_vmm("husk-vmm", process, Some(USER), Some(Path::new("/sys/fs/cgroup/kubepods/pod1")));
        walls.iter().filter(|wall| !wall.holds()).map(|wall| wall.name).collect()
    }

    #[test]
    fn each_wall_of_a_vmm_that_is_gone_is_named() {
        assert_eq!(broken(&jailed()), [""; 0]);
        type TakeAway = fn(&mut Process);
        let without: [(&str, TakeAway); 12] = [
            ("user", |process| process.threads[1].uids[3] = 0),
            ("user", |process| process.threads[2].groups.push(6)),
            ("capabilities", |process| process.threads[1].capabilities = 1 << 21),
            ("root directory", |process| process.mounts[0].read_only = false),
            ("root directory", |process| process.mounts.push(Mount { place: "/x".into(), read_only: true })),
            ("core dumps", |process| process.dumpable = true),
            ("resource limits", |process| process.limits.extend([("Max file size".to_owned(), None)])),
            ("open files", |process| process.open_directories.push("/etc".into())),
            ("new privileges", |process| process.threads[2].no_new_privs = false),
            ("system calls", |process| process.threads[0].seccomp = 0),
            ("namespaces", |process| process.shared_namespaces.push("pid")),
            ("control group", |process| process.cgroup = "/kubepods/pod10".into()),
        ];
        for (wall, take_away) in without {
            let mut process = jailed();
            take_away(&mut process);
            assert_eq!(broken(&process), [wall]);
        }
        let process = Process { oom_score: -999, ..jailed() };
        assert_eq!(broken(&process), ["OOM score"]);
    }

    #[test]
    fn a_file_server_may_change_files_and_nothing_else() {
        let mut process = jailed();
        let allowed = FILES.iter().fold(0, |all, (_, number)| all | 1u64 << number);
        process.threads[0].capabilities = allowed;
        process.threads[0].bounding = allowed;
        assert!(capabilities_for_files(&process).is_ok());
        // CAP_SYS_ADMIN, which a program that it starts would get.
        process.threads[0].bounding |= 1 << 21;
        assert!(capabilities_for_files(&process).is_err());
    }

    #[test]
    fn this_test_is_in_no_jail() {
        let me = Process::read(std::process::id()).unwrap();
        let walls = of_vmm("husk-vmm", &me, Some(USER), None);
        let text = table(&walls);
        for wall in ["user", "root directory", "namespaces", "control group"] {
            let line = text.lines().find(|line| line.contains(wall)).unwrap();
            assert!(line.contains(BROKEN), "{line}");
        }
    }
}
