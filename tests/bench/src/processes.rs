//! Finds the processes of the host that belong to a runtime, and to a pod.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Finds the process at the other end of a unix socket.
pub fn server_of(socket: &Path) -> io::Result<u32> {
    let stream = UnixStream::connect(socket)?;
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = std::mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `peer` and `length` outlive the call, and `length` is the size of
    // `peer`, which is a plain C structure.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(peer.pid.unsigned_abs()) }
}

/// A process that belongs to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub name: String,
}

/// Finds the processes that name the sandbox in their arguments, and their descendants.
pub fn of_sandbox(sandbox: &str) -> io::Result<Vec<Process>> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let mut names = HashMap::new();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process may end while it is looked at.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Some((name, parent)) = name_and_parent(&stat) else { continue };
        names.insert(pid, name);
        children.entry(parent).or_default().push(pid);
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if pid != std::process::id() && String::from_utf8_lossy(&arguments).contains(sandbox) {
            found.push(pid);
        }
    }
    let mut seen = HashSet::new();
    let mut processes = Vec::new();
    while let Some(pid) = found.pop() {
        if seen.insert(pid) {
            found.extend(children.get(&pid).into_iter().flatten());
            processes.push(Process { pid, name: names.get(&pid).cloned().unwrap_or_default() });
        }
    }
    Ok(processes)
}

/// Parses `42 (a name) S 1 ...`; the name may contain any character.
fn name_and_parent(stat: &str) -> Option<(String, u32)> {
    let (_, rest) = stat.split_once('(')?;
    let (name, rest) = rest.rsplit_once(')')?;
    let parent = rest.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some((name.to_owned(), parent))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn names_may_contain_brackets_and_spaces() {
        assert_eq!(name_and_parent("42 (a) b (c) S 7 42").unwrap(), ("a) b (c".into(), 7));
        assert!(name_and_parent("42 a S 7").is_none());
    }

    #[test]
    fn what_a_process_of_the_sandbox_started_belongs_to_it() {
        let mark = format!("sandbox-{}-of-a-test", std::process::id());
        // The shell has the mark in its arguments, the sleeper has not.
        let mut shell =
            std::process::Command::new("sh").args(["-c", "sleep 60 & wait", &mark]).spawn().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let found = loop {
            let found = of_sandbox(&mark).unwrap();
            if found.iter().any(|process| process.name == "sleep") || std::time::Instant::now() > deadline {
                break found;
            }
        };
        for process in &found {
            // SAFETY: kill touches no memory; the processes are the test's own.
            unsafe { libc::kill(process.pid as i32, libc::SIGKILL) };
        }
        shell.wait().unwrap();
        let mut names: Vec<_> = found.iter().map(|process| process.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["sh", "sleep"]);
    }

    #[test]
    fn the_server_of_a_socket_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(server_of(&path).unwrap(), std::process::id());
    }
}
