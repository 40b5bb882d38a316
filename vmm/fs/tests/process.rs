//! The process as huskd starts it: its jail, its log, its end. Needs root.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use husk_fs::abi::{AttrOut, CreateIn, InHeader, InitIn, OutHeader, ROOT, opcode};
use husk_spawn::{Detached, Spawned};
use husk_vmm_api::words::{self, LOG_SIZE};
use husk_vmm_api::{FILE_SERVER_READY, MAX_FUSE_MESSAGE};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use zerocopy::{FromBytes, IntoBytes};

/// Starts a server of a directory. Returns it with the other end of its socket;
/// `None` without the privileges for that.
fn start(root: &Path, log: &Path) -> Option<(Spawned, File)> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: it needs root");
        return None;
    }
    let (ours, theirs): (OwnedFd, OwnedFd) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let log = File::options().read(true).write(true).create(true).truncate(true).open(log).unwrap();
    let program = Detached::new(Path::new(env!("CARGO_BIN_EXE_husk-fs")))
        .unwrap()
        .arguments(["--id", "test", "--uids", "0:1000", "--gids", "0:1000", "--trusted", "t", "--root"])
        .unwrap()
        .arguments([root])
        .unwrap()
        .stdin(theirs)
        .log(log)
        .limits([(libc::RLIMIT_NPROC, 64), (libc::RLIMIT_MEMLOCK, 0), (libc::RLIMIT_CORE, 0)])
        .own_pids();
    Some((program.spawn().unwrap(), ours.into()))
}

fn wait_gone(process: &Spawned) {
    let start = Instant::now();
    while Path::new(&format!("/proc/{}", process.pid)).exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "process {} does not end", process.pid);
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn receive(socket: &mut File) -> Vec<u8> {
    let mut packet = vec![0; MAX_FUSE_MESSAGE];
    let len = socket.read(&mut packet).unwrap();
    packet.truncate(len);
    packet
}

/// Sends a request; returns the error of the answer, 0 for none, and its body.
fn ask(socket: &mut File, header: InHeader, body: &[u8]) -> (i32, Vec<u8>) {
    let len = (size_of::<InHeader>() + body.len()) as u32;
    let packet = [InHeader { len, unique: 7, ..header }.as_bytes(), body].concat();
    socket.write_all(&packet).unwrap();
    let answer = receive(socket);
    let (header, body) = OutHeader::read_from_prefix(&answer).unwrap();
    (header.error, body.to_vec())
}

#[test]
fn a_jailed_server_serves_its_directory_and_ends_with_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let (root, log) = (folder.path().join("root"), folder.path().join("log"));
    fs::create_dir(&root).unwrap();
    let Some((process, mut socket)) = start(&root, &log) else { return };
    assert_eq!(receive(&mut socket), FILE_SERVER_READY, "{:?}", words::read(File::open(&log).unwrap()));

    let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
    for line in [format!("NSpid:\t{}\t1", process.pid), "NoNewPrivs:\t1".into(), "Seccomp:\t2".into()] {
        assert!(status.lines().any(|other| other == line), "{line} in {status}");
    }
    let open = fs::read_dir(format!("/proc/{}/fd", process.pid)).unwrap();
    let names: Vec<_> = open.map(|fd| fs::read_link(fd.unwrap().path()).unwrap_or_default()).collect();
    assert!(!names.contains(&log), "{names:?}");
    assert_eq!(fs::metadata(&log).unwrap().len(), LOG_SIZE as u64);

    let init = InitIn { major: 7, minor: 36, ..InitIn::default() };
    assert_eq!(
        ask(&mut socket, InHeader { opcode: opcode::INIT, ..InHeader::default() }, init.as_bytes()).0,
        0
    );
    let getattr = InHeader { opcode: opcode::GETATTR, node: ROOT, ..InHeader::default() };
    let (error, body) = ask(&mut socket, getattr, &[0; 16]);
    let attributes = AttrOut::read_from_prefix(&body).unwrap().0;
    assert_eq!(
        (error, attributes.attr.ino & 0xffff_ffff),
        (0, fs::metadata(&root).unwrap().ino() & 0xffff_ffff)
    );
    // The arguments reach the policy: a foreign id is refused before anything else is
    // checked.
    let create =
        [CreateIn { flags: 0x42, mode: 0o644, ..CreateIn::default() }.as_bytes(), b"file\0"].concat();
    let asker = InHeader { opcode: opcode::CREATE, node: ROOT, uid: 5000, ..InHeader::default() };
    assert_eq!(ask(&mut socket, asker, &create).0, -libc::EPERM);

    drop(socket);
    wait_gone(&process);
}

#[test]
fn a_server_that_cannot_start_says_why_in_its_log() {
    let folder = tempfile::tempdir().unwrap();
    let (root, log) = (folder.path().join("missing"), folder.path().join("log"));
    let Some((process, mut socket)) = start(&root, &log) else { return };
    assert!(receive(&mut socket).is_empty());
    wait_gone(&process);
    let said = words::read(File::open(&log).unwrap()).unwrap();
    assert!(said.contains("missing") && said.contains("No such file"), "{said}");
}

#[test]
fn a_host_that_shuts_down_ends_it_by_asking() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let Some((process, mut socket)) = start(folder.path(), &log) else { return };
    assert_eq!(receive(&mut socket), FILE_SERVER_READY);
    let pid = rustix::process::Pid::from_raw(process.pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait_gone(&process);
}
