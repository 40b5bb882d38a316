//! Starts `husk-fs`, which serves a pod's volumes, and tells the VMM of it.
//!
//! A pod has a file server from its first volume on, until its VM ends: the server
//! ends with the socket between the two. Like the VMM it outlives huskd, which
//! finds it again by its record.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use husk_base::id::SandboxId;
use husk_base::{blocking, cgroup, crash};
use husk_proto::agent::UserNamespace;
use husk_spawn::{Detached, Limit};
use husk_vmm_api::{FILE_SERVER_READY, FsState, words};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, setsockopt, socketpair, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::{Control, Error};

/// Bytes that may be on their way in one direction.
const SOCKET_BUFFER: usize = 1 << 20;

/// The longest time until a file server is ready, seconds.
const START_SECONDS: i64 = 30;

/// The resource limits of a file server. Files of volumes have any size and number: the
/// server raises the limit of open files itself, and has as many threads as requests.
const LIMITS: [Limit; 3] = [(libc::RLIMIT_NPROC, 64), (libc::RLIMIT_MEMLOCK, 0), (libc::RLIMIT_CORE, 0)];

/// The name of the record in the VM's run directory, which says which process the file
/// server is.
const RECORD: &str = "fs.process";

/// A file server that is to be started.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The pod.
    pub id: &'a SandboxId,
    /// The `husk-fs` program.
    pub program: &'a Path,
    /// The directory that is served.
    pub root: &'a Path,
    /// The VM's run directory, for the log and the record.
    pub run_dir: &'a Path,
    /// The pod's control group.
    pub cgroup: Option<PathBuf>,
    /// The prefix of the names of volumes that are trusted: the guest may leave any kind of
    /// file in them.
    pub trusted: &'a str,
    /// The pod's user namespace, whose ids are the only ones that files may have; `None` for
    /// any ids.
    pub users: Option<UserNamespace>,
}

/// Starts the VM's file server unless it has one.
///
/// # Errors
/// The step that failed, with its reason.
pub async fn ensure(control: &Control, plan: Plan<'_>) -> Result<(), Error> {
    const STAGE: &str = "start file server";
    let problem = |cause: &str| Error::Control { stage: STAGE, cause: cause.into() };
    match control.info().await?.fs {
        FsState::Serving => return Ok(()),
        FsState::Waiting => {}
        FsState::None => return Err(problem("the machine has no file system device")),
        FsState::Gone => return Err(problem("it has died, and the pod's files with it: restart the pod")),
    }
    let log = plan.run_dir.join("fs.log");
    let record = plan.run_dir.join(RECORD);
    let (started, process) = start(&plan, &log).map_err(Error::file(STAGE, plan.program))?;
    crash::point("file server started");
    let log_path = log.clone();
    let socket = blocking(move || wait_ready(started, &log_path)).await.map_err(Error::file(STAGE, &log))?;
    tokio::fs::write(&record, process.to_string()).await.map_err(Error::file(STAGE, &record))?;
    crash::point("file server recorded");
    control.attach_fs(socket).await
}

/// The mount namespace of a VM's file server; `None` when there is no server,
/// or it has ended, and the namespace with it.
///
/// # Errors
/// The file system's error.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
pub fn namespace(run_dir: &Path) -> Result<Option<OwnedFd>, Error> {
    let record = run_dir.join(RECORD);
    let recorded = match std::fs::read_to_string(&record) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        recorded => recorded.map_err(Error::file("find the file server", &record))?,
    };
    let Some(process) = Process::parse(&recorded) else { return Ok(None) };
    let Ok(namespace) = File::open(format!("/proc/{}/ns/mnt", process.pid)) else { return Ok(None) };
    // Another process that has the id by now began later.
    Ok((Process::of(process.pid) == Some(process)).then(|| namespace.into()))
}

/// Starts the file server; answers the VMM's end of the socket.
fn start(plan: &Plan<'_>, log: &Path) -> io::Result<(OwnedFd, Process)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    for socket in [&ours, &theirs] {
        // Without the privilege the buffer is as large as any process may have it.
        if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
            setsockopt(socket, sockopt::SndBuf, &SOCKET_BUFFER)?;
        }
    }
    let mut program = Detached::new(plan.program)?
        .arguments(["--id", plan.id.as_str(), "--root"])?
        .arguments([plan.root])?
        .arguments(["--trusted", plan.trusted])?
        .stdin(theirs)
        .log(super::record_file(log)?)
        .limits(LIMITS)
        .own_pids();
    for (option, ranges) in id_options(plan.users.as_ref()) {
        program = program.arguments([option, &ranges])?;
    }
    if let Some(path) = &plan.cgroup {
        cgroup::make(path)?;
        program = program.cgroup(path)?;
    }
    let process = Process::of(program.spawn()?.pid).ok_or_else(|| io::Error::other("it ended at once"))?;
    Ok((ours, process))
}

/// Options for the ids that files may have in a pod with a user namespace: the container's
/// own ids in volumes that are mapped, and the host's ids for them in others.
fn id_options(users: Option<&UserNamespace>) -> Vec<(&'static str, String)> {
    let Some(users) = users else { return Vec::new() };
    let uids = users.uids.iter().map(|range| ("--uids", range));
    let gids = users.gids.iter().map(|range| ("--gids", range));
    uids.chain(gids)
        .flat_map(|(option, range)| {
            [range.container_id, range.host_id].map(|first| (option, format!("{first}:{}", range.length)))
        })
        .collect()
}

/// A process: its id and its start time (clock ticks since the host's boot).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    began: u64,
}

impl Process {
    #[expect(clippy::disallowed_methods, reason = "a file of /proc waits for no disk")]
    fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self { pid, began: husk_base::start_time(&stat)? })
    }

    fn parse(text: &str) -> Option<Self> {
        let (pid, began) = text.split_once(' ')?;
        Some(Self { pid: pid.parse().ok()?, began: began.parse().ok()? })
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.pid, self.began)
    }
}

/// Waits until the file server says that it is ready. A server that does not ends by itself,
/// because the socket is closed here.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn wait_ready(socket: OwnedFd, log: &Path) -> io::Result<OwnedFd> {
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(START_SECONDS))?;
    let mut word = [0; 16];
    let raw = std::os::fd::AsRawFd::as_raw_fd(&socket.as_fd());
    let len = recv(raw, &mut word, MsgFlags::empty())?;
    if word.get(..len) != Some(FILE_SERVER_READY) {
        let said = File::open(log).and_then(words::read).unwrap_or_default();
        return Err(io::Error::other(format!("it ended at once: {}", said.trim())));
    }
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(0))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_belong_to_the_users_of_the_pods_namespace() {
        let range =
            |container_id, host_id, length| husk_proto::agent::IdMapping { container_id, host_id, length };
        let users =
            UserNamespace { uids: vec![range(0, 131_072, 65_536)], gids: vec![range(0, 196_608, 1000)] };
        let options: Vec<_> =
            id_options(Some(&users)).iter().map(|(option, ids)| format!("{option} {ids}")).collect();
        assert_eq!(options, ["--uids 0:65536", "--uids 131072:65536", "--gids 0:1000", "--gids 196608:1000"]);
        assert!(id_options(None).is_empty());
    }

    #[test]
    fn a_process_is_found_again_and_no_other_is_taken_for_it() {
        let folder = tempfile::tempdir().unwrap();
        assert!(namespace(folder.path()).unwrap().is_none());
        let me = Process::of(std::process::id()).unwrap();
        let record = folder.path().join(RECORD);
        std::fs::write(&record, me.to_string()).unwrap();
        assert!(namespace(folder.path()).unwrap().is_some());
        std::fs::write(&record, Process { began: me.began + 1, ..me }.to_string()).unwrap();
        assert!(namespace(folder.path()).unwrap().is_none());
        std::fs::write(&record, "nonsense").unwrap();
        assert!(namespace(folder.path()).unwrap().is_none());
    }
}
