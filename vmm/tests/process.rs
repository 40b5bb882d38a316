//! The process without a machine: its jail, and the exit record that it leaves.
//! Needs root, and no KVM.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use husk_spawn::{Detached, Spawned};
use husk_vmm_api::words::{self, EXIT_SIZE, LOG_SIZE};
use husk_vmm_api::{Exit, ExitReason, Request, Response, socket};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, setsockopt,
    socket as new_socket, sockopt,
};
use nix::unistd::Pid;

/// A user that owns nothing.
const USER: u32 = 0x7100_0001;

fn seqpacket() -> OwnedFd {
    new_socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap()
}

fn record(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap()
}

/// Starts the process as huskd does, with its files in `folder`; `None` without the
/// privileges for that.
fn start(folder: &Path) -> Option<Spawned> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: it needs root");
        return None;
    }
    let listener = seqpacket();
    bind(listener.as_raw_fd(), &UnixAddr::new(&folder.join("control")).unwrap()).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    let program = Detached::new(Path::new(env!("CARGO_BIN_EXE_husk-vmm")))
        .unwrap()
        .arguments(["--id", "test", "--user", &USER.to_string(), "--control-fd", "3", "--exit-fd", "4"])
        .unwrap()
        .log(record(&folder.join("log")))
        .descriptor(listener)
        .descriptor(record(&folder.join("exit")).into())
        .limits([(libc::RLIMIT_FSIZE, 1 << 30), (libc::RLIMIT_NOFILE, 4096), (libc::RLIMIT_NPROC, 25)])
        .limits([(libc::RLIMIT_MEMLOCK, 0), (libc::RLIMIT_CORE, 0)])
        .own_pids();
    Some(program.spawn().unwrap())
}

fn client(folder: &Path) -> OwnedFd {
    let socket = seqpacket();
    setsockopt(&socket, sockopt::PassCred, &true).unwrap();
    connect(socket.as_raw_fd(), &UnixAddr::new(&folder.join("control")).unwrap()).unwrap();
    socket
}

fn wait_gone(process: &Spawned) {
    let start = Instant::now();
    while Path::new(&format!("/proc/{}", process.pid)).exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "process {} does not end", process.pid);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_jailed_process_answers_and_leaves_a_record() {
    let folder = tempfile::tempdir().unwrap();
    let Some(process) = start(folder.path()) else { return };
    let client = client(folder.path());
    socket::send(client.as_fd(), &Request::Info, &[]).unwrap();
    let answer = socket::receive_from::<Response>(client.as_fd()).unwrap().unwrap();
    let Response::Info(info) = answer.message else { panic!("{:?}", answer.message) };
    // The process sees itself as the first of its namespace, and the kernel reports its
    // true number.
    assert_eq!((info.pid, info.booted, answer.pid), (1, false, Some(process.pid)));

    let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
    for line in [
        format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}"),
        format!("NSpid:\t{}\t1", process.pid),
        "CapPrm:\t0000000000000000".into(),
        "NoNewPrivs:\t1".into(),
        "Seccomp:\t2".into(),
    ] {
        assert!(status.lines().any(|other| other == line), "{line} in {status}");
    }
    assert_eq!(fs::read_dir(format!("/proc/{}/root", process.pid)).unwrap().count(), 0);
    // Neither the log nor the record is open any more.
    let open = fs::read_dir(format!("/proc/{}/fd", process.pid)).unwrap();
    let names: Vec<_> = open.map(|fd| fs::read_link(fd.unwrap().path()).unwrap_or_default()).collect();
    assert!(!names.iter().any(|name| name.starts_with(folder.path())), "{names:?}");
    for (name, size) in [("log", LOG_SIZE), ("exit", EXIT_SIZE)] {
        assert_eq!(fs::metadata(folder.path().join(name)).unwrap().len(), size as u64, "{name}");
    }

    socket::send(client.as_fd(), &Request::Kill, &[]).unwrap();
    wait_gone(&process);
    let text = words::read(File::open(folder.path().join("exit")).unwrap()).unwrap();
    assert_eq!(serde_json::from_str::<Exit>(&text).unwrap().reason, ExitReason::Killed);
}

#[test]
fn a_host_that_shuts_down_ends_it_by_asking() {
    let folder = tempfile::tempdir().unwrap();
    let Some(process) = start(folder.path()) else { return };
    // The response shows that it is at work.
    let client = client(folder.path());
    socket::send(client.as_fd(), &Request::Info, &[]).unwrap();
    socket::receive::<Response>(client.as_fd()).unwrap().unwrap();
    kill(Pid::from_raw(process.pid.cast_signed()), Signal::SIGTERM).unwrap();
    wait_gone(&process);
}
