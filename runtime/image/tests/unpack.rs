//! The process that unpacks layers: its jail, and its work inside.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use husk_base::id::hex;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Starts the process in a folder with the files of layers.
fn start(folder: &Path, diff_ids: &[String]) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_husk-unpack"))
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let limits = json!({"bytes": 1 << 30, "entries": 1000, "devices": 10});
    let request = json!({"limits": limits, "diff_ids": diff_ids}).to_string();
    child.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
    child
}

#[test]
fn the_process_has_given_up_all_but_the_files_of_its_pull() {
    let folder = tempfile::tempdir().unwrap();
    // Nobody writes this layer: the process waits for it.
    nix::unistd::mkfifo(&folder.path().join("layer-0"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let mut child = start(folder.path(), &["sha256:00".to_owned()]);
    let deadline = Instant::now() + Duration::from_secs(20);
    // The folder is made inside the jail.
    while !folder.path().join("files").exists() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    let process = Path::new("/proc").join(child.id().to_string());
    let status = std::fs::read_to_string(process.join("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap().trim().to_owned()
    };
    // These are CHOWN, DAC_OVERRIDE, FOWNER, FSETID, MKNOD, SETFCAP.
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(field(set), "000000008800001b", "{set}");
    }
    assert_eq!((field("CapInh"), field("CapAmb")), ("0".repeat(16), "0".repeat(16)));
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".to_owned(), "2".to_owned()));
    assert_eq!(field("Name"), "husk-unpack");
    for namespace in ["net", "mnt", "ipc", "uts"] {
        let of = |process: &Path| std::fs::read_link(process.join("ns").join(namespace)).unwrap();
        assert_ne!(of(&process), of(Path::new("/proc/self")), "{namespace}");
    }
    let names: BTreeSet<_> =
        std::fs::read_dir(process.join("root")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["files", "layer-0"].map(Into::into).into());
    let mounts = std::fs::read_to_string(process.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for flag in ["nodev", "nosuid", "noexec"] {
        assert!(mounts.contains(flag), "{mounts}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn files_of_any_owner_and_kind_are_made_in_the_jail() {
    let folder = tempfile::tempdir().unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: tar::EntryType, mode: u32, body: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_path(path).unwrap();
        header.set_entry_type(kind);
        header.set_uid(1001);
        header.set_gid(1002);
        header.set_mode(mode);
        header.set_size(body.len() as u64);
        header.set_mtime(1_600_000_000);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        tar.append(&header, body).unwrap();
    };
    // Only its owner may write into this folder, and more comes in it.
    add("closed", tar::EntryType::Directory, 0o700, b"");
    add("closed/tool", tar::EntryType::Regular, 0o6755, b"run");
    add("closed/null", tar::EntryType::Char, 0o666, b"");
    add("closed/pipe", tar::EntryType::Fifo, 0o600, b"");
    let bytes = tar.into_inner().unwrap();
    std::fs::write(folder.path().join("layer-0"), &bytes).unwrap();
    let child = start(folder.path(), &[format!("sha256:{}", hex(&Sha256::digest(&bytes)))]);
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), r#"{"done":{"holes":false}}"#);
    assert!(output.status.success());
    assert!(!folder.path().join("layer-0").exists(), "its room is needed");
    let closed = folder.path().join("files/closed");
    let tool = std::fs::metadata(closed.join("tool")).unwrap();
    assert_eq!((tool.uid(), tool.gid(), tool.mtime()), (1001, 1002, 1_600_000_000));
    assert_eq!(tool.permissions().mode() & 0o7777, 0o6755);
    assert!(std::fs::metadata(closed.join("null")).unwrap().file_type().is_char_device());
    assert!(std::fs::metadata(closed.join("pipe")).unwrap().file_type().is_fifo());
}

#[test]
fn a_layer_that_lies_is_told() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("layer-0"), b"no archive").unwrap();
    let output = start(folder.path(), &["sha256:00".to_owned()]).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("refused") && text.contains("damaged"), "{text}");
}

/// The packer in a folder, with a shell script in the place of `mkfs.erofs`.
fn pack_with_script(folder: &Path, script: &str) -> Command {
    let programs = folder.join("programs");
    std::fs::create_dir_all(&programs).unwrap();
    let program = programs.join("mkfs.erofs");
    std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let mut packer = Command::new(env!("CARGO_BIN_EXE_husk-unpack"));
    packer.arg("--pack").arg(folder).arg("1048576").env("PATH", &programs);
    packer
}

#[test]
fn mkfs_erofs_has_its_input_and_its_output_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    std::fs::create_dir_all(files.join("closed")).unwrap();
    std::fs::write(files.join("closed/secret"), "read\n").unwrap();
    for path in ["closed", "closed/secret"].map(|name| files.join(name)) {
        std::os::unix::fs::chown(&path, Some(1001), Some(1001)).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o500)).unwrap();
    }
    std::fs::create_dir(folder.path().join("tmp")).unwrap();
    let gate = folder.path().join("tmp/gate");
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRUSR).unwrap();
    // A shell that starts no process has these words. Each redirection is a line of its own
    // program, because one that fails ends the shell.
    let script = "read said </files/closed/secret; echo $said >/rootfs.erofs
        command exec 3>/files/new && echo wrote >>/rootfs.erofs
        command exec 3</etc/passwd && echo left >>/rootfs.erofs
        command exec 3>/usr/husk-test && echo damaged >>/rootfs.erofs
        for file in /*; do echo $file; done >>/rootfs.erofs
        read said </tmp/gate";
    let mut child = pack_with_script(folder.path(), script).stderr(Stdio::null()).spawn().unwrap();
    let process = Path::new("/proc").join(child.id().to_string());
    let written = || std::fs::read_to_string(folder.path().join("rootfs.erofs")).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !written().contains("/usr\n") {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "{}", written());
        std::thread::sleep(Duration::from_millis(5));
    }
    let status = std::fs::read_to_string(process.join("status")).unwrap();
    let namespaces = ["net", "mnt", "ipc", "uts"].map(|namespace| {
        let of = |process: &Path| std::fs::read_link(process.join("ns").join(namespace)).unwrap();
        of(&process) != of(Path::new("/proc/self"))
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap().trim().to_owned()
    };
    // DAC_READ_SEARCH.
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(field(set), "0000000000000004", "{set}");
    }
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".to_owned(), "2".to_owned()));
    assert_eq!(namespaces, [true; 4]);
    let written = written();
    let (said, root) = written.split_once('\n').unwrap();
    assert_eq!(said, "read");
    for entry in root.lines() {
        let top = folder.path().components().nth(1).unwrap().as_os_str().to_str().unwrap();
        let known =
            ["files", "rootfs.erofs", "tmp", "usr", "bin", "sbin", "lib", "lib64", "etc", "nix", "gnu"];
        let name = entry.trim_start_matches('/');
        assert!(known.contains(&name) || name == top, "{written}");
    }
}

#[test]
fn mkfs_erofs_that_fails_or_is_not_there_is_told() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("files")).unwrap();
    let output = pack_with_script(folder.path(), "echo oh >&2; exit 3").output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(3), b"oh\n".as_slice()));
    std::fs::remove_file(folder.path().join("programs/mkfs.erofs")).unwrap();
    let mut packer = Command::new(env!("CARGO_BIN_EXE_husk-unpack"));
    packer.arg("--pack").arg(folder.path()).arg("1048576").env("PATH", folder.path());
    let output = packer.output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("not found"));
}
