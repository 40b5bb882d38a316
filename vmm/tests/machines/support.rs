//! Starts `husk-vmm` as huskd does, with the files that a test guest needs.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use husk_vmm_api::{Exit, Request, Response, VmConfig, socket};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, setsockopt,
    socket as new_socket, sockopt,
};
use nix::sys::time::TimeVal;

/// The user that the VMM becomes.
pub const USER: u32 = 0x7000_0001;

/// The time limit of everything in these tests.
pub const TIME_LIMIT: Duration = Duration::from_secs(120);

/// The init program of the guest. `TEST=` on the command line chooses its task.
const INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
say() { echo "$*" > /dev/console; }
finish() { echo "husk: shutdown" > /dev/console; sleep 0.2; reboot -f; sleep 100; }
waitfor() { until eval "$1"; do sleep 0.05; done; }
case "$TEST" in
shutdown) finish ;;
reset) reboot -f; sleep 100 ;;
panic) exit 3 ;;
idle) say "guest is up"; while :; do sleep 1000; done ;;
size) say "cpus $(nproc) memory $(awk '/MemTotal/ { print $2 }' /proc/meminfo)"; finish ;;
disks)
    say "root is $(awk '$2 == "/" { print $1, $4 }' /proc/mounts)"
    say "vda is $(cat /sys/block/vda/serial), $(cat /sys/block/vda/size) sectors"
    dd if=/dev/vda bs=512 count=1 skip=3 2>/dev/null | tr -d '\0' > /dev/console
    echo
    echo "written by the guest" | dd of=/dev/vda bs=512 seek=5 conv=fsync 2>/dev/null
    dd if=/dev/zero of=/dev/vda bs=64k seek=1 count=100 conv=fsync 2>/dev/null
    md5sum /dev/vda > /dev/console
    finish ;;
slots)
    say "slot is $(cat /sys/block/vda/serial), $(cat /sys/block/vda/size) sectors"
    say "ready for a disk"
    waitfor '[ "$(cat /sys/block/vda/size)" != 0 ]'
    say "got $(cat /sys/block/vda/size) sectors: $(head -c 512 /dev/vda | tr -d '\0')"
    echo no > /dev/vda && sync -f /dev/vda
    say "ready to lose it"
    waitfor '[ "$(cat /sys/block/vda/size)" = 0 ]'
    say "lost it"
    finish ;;
count)
    number=0
    while :; do
        number=$((number + 1))
        say "$number: $(dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | tr -d '\0'), $(date +%s)"
        sleep 0.05
    done ;;
*) say "unknown test: $TEST" ;;
esac
"#;

/// The kernel under test.
pub fn kernel() -> File {
    let path = std::env::var("HUSK_TEST_KERNEL").expect("HUSK_TEST_KERNEL names a guest kernel (vmlinux)");
    File::open(&path).unwrap_or_else(|error| panic!("open {path}: {error}"))
}

/// An EROFS image with busybox and [`INIT`].
pub fn rootfs(directory: &Path) -> File {
    let tree = directory.join("rootfs");
    for name in ["bin", "sbin", "dev", "proc", "sys", "tmp"] {
        fs::create_dir_all(tree.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("busybox-static is installed");
    for applet in [
        "sh", "mount", "cat", "sleep", "reboot", "nproc", "awk", "dd", "tr", "md5sum", "head", "sync",
        "echo", "date",
    ] {
        symlink("busybox", tree.join("bin").join(applet)).unwrap();
    }
    let init = tree.join("sbin/init");
    fs::write(&init, INIT).unwrap();
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let image = directory.join("rootfs.erofs");
    let output = Command::new("mkfs.erofs")
        .arg("-Enoinline_data")
        .arg(&image)
        .arg(&tree)
        .output()
        .expect("erofs-utils is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    File::open(image).unwrap()
}

/// A running `husk-vmm`.
pub struct Vmm {
    process: Child,
    directory: tempfile::TempDir,
    pub config: VmConfig,
}

impl Vmm {
    /// Starts the process; it has no machine yet.
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener =
            new_socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&directory.path().join("control")).unwrap()).unwrap();
        listen(&listener, Backlog::new(8).unwrap()).unwrap();
        let exit = File::create(directory.path().join("exit")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk-vmm"));
        let (control_fd, exit_fd) = (listener.as_raw_fd(), exit.as_raw_fd());
        command
            .args([
                "--id",
                "test",
                "--user",
                &USER.to_string(),
                "--control-fd",
                &control_fd.to_string(),
                "--exit-fd",
                &exit_fd.to_string(),
            ])
            .stdin(Stdio::null());
        // SAFETY: fcntl is all that happens between fork and exec.
        unsafe {
            command.pre_exec(move || {
                for fd in [control_fd, exit_fd] {
                    libc::fcntl(fd, libc::F_SETFD, 0);
                }
                Ok(())
            });
        }
        let process = command.spawn().unwrap();
        let config = VmConfig {
            vcpus: 1,
            memory_mib: 128,
            kernel: 0,
            cmdline: String::new(),
            root: 1,
            disks: Vec::new(),
            slots: Vec::new(),
            slot_limit: None,
            console_limit: None,
            nets: Vec::new(),
            vsock: None,
            fs: None,
            fs_limit: None,
            balloon: false,
            template: None,
        };
        Self { process, directory, config }
    }

    /// Starts the process, and a guest that runs `test`.
    pub fn boot(test: &str, change: impl FnOnce(&mut VmConfig), files: &[&File]) -> Self {
        let mut vmm = Self::start();
        vmm.config.cmdline = format!("TEST={test}");
        change(&mut vmm.config);
        vmm.ask_to_boot(files).unwrap();
        vmm
    }

    /// Starts the process, and a machine; `Err` with the response when there is
    /// none.
    pub fn boot_as(config: VmConfig, files: &[&File]) -> Result<Self, Response> {
        let mut vmm = Self::start();
        vmm.config = config;
        vmm.ask_to_boot(files)?;
        Ok(vmm)
    }

    fn ask_to_boot(&self, files: &[&File]) -> Result<(), Response> {
        let (kernel, rootfs) = (kernel(), rootfs(self.directory.path()));
        let mut fds = vec![kernel.as_fd(), rootfs.as_fd()];
        fds.extend(files.iter().map(|file| file.as_fd()));
        match self.ask(&Request::Boot(Box::new(self.config.clone())), &fds) {
            Response::Ok => Ok(()),
            other => Err(other),
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn connect(&self) -> OwnedFd {
        self.try_connect().unwrap()
    }

    fn try_connect(&self) -> nix::Result<OwnedFd> {
        let socket =
            new_socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let patience = TimeVal::new(TIME_LIMIT.as_secs() as i64, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience).unwrap();
        let path: PathBuf = self.directory.path().join("control");
        connect(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap())?;
        Ok(socket)
    }

    pub fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Response {
        let client = self.connect();
        socket::send(client.as_fd(), request, fds).unwrap();
        socket::receive(client.as_fd()).unwrap().expect("a response").0
    }

    /// Sends a request; `None` when the VMM turns the client away.
    pub fn try_ask(&self, request: &Request) -> Option<Response> {
        let client = self.connect();
        socket::send(client.as_fd(), request, &[]).ok()?;
        Some(socket::receive(client.as_fd()).ok()??.0)
    }

    pub fn console(&self) -> String {
        match self.ask(&Request::Console, &[]) {
            Response::Console { text } => text,
            other => panic!("{other:?}"),
        }
    }

    pub fn wait_console(&self, text: &str) {
        let deadline = Instant::now() + TIME_LIMIT;
        while !self.console().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in: {}", self.console());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the machine's end. The response to the waiting client, the
    /// exit file and the process's exit code must agree.
    pub fn wait(mut self) -> Exit {
        // The machine may have ended already, without a listener.
        let heard = self.try_connect().ok().and_then(|client| {
            socket::send(client.as_fd(), &Request::Wait, &[]).ok()?;
            socket::receive::<Response>(client.as_fd()).ok().flatten()
        });
        let deadline = Instant::now() + TIME_LIMIT;
        let status = loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the process does not end");
            std::thread::sleep(Duration::from_millis(10));
        };
        let exit: Exit =
            serde_json::from_slice(&fs::read(self.directory.path().join("exit")).unwrap()).unwrap();
        assert_eq!(status.code(), Some(exit.reason.code()), "{exit:?}");
        if let Some((response, _)) = heard {
            assert_eq!(response, Response::Exited(exit.clone()));
        }
        exit
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Ok(None) = self.process.try_wait()
        {
            let console = self.try_ask(&Request::Console);
            eprintln!("--- console\n{console:?}\n---");
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A file of `size` bytes that begins with `text` at `offset`.
pub fn disk(size: u64, offset: u64, text: &str) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(offset)).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}
