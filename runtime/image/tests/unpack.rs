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
