//! Unpacks layers in a jailed process of its own.
//!
//! The author of an image chooses every byte that the decompressors and the tar reader see.
//! So huskd starts itself under the name [`NAME`]. That process sees the folder of one pull
//! and nothing else of the host, has no network, keeps the capabilities that owners and
//! modes of files need, and can make few system calls (`jail`). It reads a request from its
//! standard input and answers on its standard output.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use husk_base::{FileError, chain};
use husk_spawn::helper;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::Error;
use super::layer::{Failure, Limits, Unpacker};

mod jail;
mod packer;

pub(super) use packer::{PACK, PACKED};

/// The name under which huskd unpacks.
pub const NAME: &str = "husk-unpack";

/// Most bytes of an answer that are read.
const MAX_REPLY: u64 = 64 << 10;
/// Most bytes that are read of the process's standard error.
const MAX_WORDS: u64 = 4 << 10;
/// The folder of a pull into which its layers are unpacked.
const FILES: &str = "files";

/// The layers of one image, in the order in which they are applied.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    limits: Limits,
    diff_ids: Vec<String>,
}

/// The result of unpacking.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Done {
        /// Whether one of the files is sparse.
        holes: bool,
    },
    /// The layers are at fault.
    Refused(String),
    /// The disk is at fault.
    Disk { stage: String, path: PathBuf, errno: Option<i32>, cause: String },
    /// The jail could not be entered.
    Jail(String),
}

/// The file of a layer in the folder of a pull.
pub(super) fn layer_path(workspace: &Path, number: usize) -> PathBuf {
    workspace.join(format!("layer-{number}"))
}

/// The folder into which layers are unpacked.
fn files(workspace: &Path) -> PathBuf {
    workspace.join(FILES)
}

/// Unpacks the layers that are in the folder of a pull. Returns whether one of the files
/// is sparse. Dropping the future kills the process.
pub(super) async fn unpack(
    program: &Path,
    workspace: &Path,
    limits: &Limits,
    diff_ids: Vec<String>,
    reference: &str,
) -> Result<bool, Error> {
    let broken = |cause: String| Error::Unpacker { reference: reference.to_owned(), cause };
    let request = serde_json::to_vec(&Request { limits: limits.clone(), diff_ids });
    let request = request.map_err(|error| broken(error.to_string()))?;
    let mut child = Command::from(helper(program))
        .arg0(NAME)
        .arg(workspace)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| broken(format!("start {}: {error}", program.display())))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(mut stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
        return Err(broken("it has no standard streams".into()));
    };
    let write = async move {
        // If the process has ended before it has read everything, the reason is
        // below.
        let _ = stdin.write_all(&request).await;
    };
    let read = async move {
        let mut reply = Vec::new();
        let mut stdout = stdout.take(MAX_REPLY);
        stdout.read_to_end(&mut reply).await.map(|_| reply)
        // The pipe is closed here: a process that writes more ends.
    };
    let mut words = Vec::new();
    let mut stderr = stderr.take(MAX_WORDS);
    let ((), reply, _) = tokio::join!(write, read, stderr.read_to_end(&mut words));
    let reply = reply.map_err(|error| broken(error.to_string()))?;
    drop(stderr);
    let status = child.wait().await.map_err(|error| broken(error.to_string()))?;
    match serde_json::from_slice(&reply) {
        Ok(Reply::Done { holes }) if status.success() => Ok(holes),
        Ok(Reply::Refused(cause)) => {
            Err(Error::Refused { reference: reference.to_owned(), cause: format!("unpack: {cause}") })
        }
        Ok(Reply::Disk { stage, path, errno, cause }) => {
            let source =
                errno.map_or_else(|| std::io::Error::other(cause), std::io::Error::from_raw_os_error);
            // The process sees the pull's folder as its root directory.
            let path = workspace.join(path.strip_prefix("/").unwrap_or(&path));
            Err(FileError { stage: known_stage(&stage), path, source }.into())
        }
        Ok(Reply::Jail(cause)) => Err(broken(cause)),
        Ok(Reply::Done { .. }) | Err(_) => {
            let words = String::from_utf8_lossy(&words);
            let words: String = words.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            Err(broken(format!("the process ended with {status}: {}", words.trim())))
        }
    }
}

/// The stage of an error, if it is one of the unpacker's.
fn known_stage(stage: &str) -> &'static str {
    const STAGES: [&str; 15] = [
        "open",
        "look at",
        "make device node",
        "make fifo",
        "make file",
        "make folder",
        "make hard link",
        "make symbolic link",
        "read layer",
        "remove layer",
        "set attribute of",
        "set owner of",
        "set time of",
        "write file",
        "open image",
    ];
    STAGES.into_iter().find(|known| *known == stage).unwrap_or("unpack")
}

/// Whether this process was started to unpack.
#[must_use]
pub fn is_asked() -> bool {
    std::env::args_os().next().is_some_and(|name| name == NAME)
}

/// The process that unpacks: its argument is the folder of a pull. Or the one that packs.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == PACK) {
        eprintln!("{}", packer::main(arguments));
        return ExitCode::FAILURE;
    }
    let reply = serve();
    let done = matches!(reply, Reply::Done { .. });
    let text = serde_json::to_vec(&reply).unwrap_or_default();
    match std::io::stdout().write_all(&text) {
        Ok(()) if done => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn serve() -> Reply {
    let Some(workspace) = std::env::args_os().nth(1) else {
        return Reply::Jail(format!("usage: {NAME} FOLDER; it is started by huskd"));
    };
    let mut text = Vec::new();
    let request = std::io::stdin()
        .read_to_end(&mut text)
        .and_then(|_| serde_json::from_slice::<Request>(&text).map_err(Into::into));
    let request = match request {
        Ok(request) => request,
        Err(error) => return Reply::Jail(format!("read the request: {error}")),
    };
    if let Err(error) = jail::enter(Path::new(&workspace), request.limits.bytes) {
        return Reply::Jail(chain(&error));
    }
    match apply(Path::new("/"), &request) {
        Ok(holes) => Reply::Done { holes },
        Err(Failure::Refused(cause)) => Reply::Refused(cause),
        Err(Failure::Disk(stage, path, error)) => Reply::Disk {
            stage: stage.to_owned(),
            path,
            errno: error.raw_os_error(),
            cause: error.to_string(),
        },
    }
}

/// Unpacks the layers below `workspace`, and removes the blob of each layer when it is
/// unpacked. Returns whether a file is sparse.
fn apply(workspace: &Path, request: &Request) -> Result<bool, Failure> {
    let folder = files(workspace);
    std::fs::create_dir(&folder).map_err(|error| Failure::Disk("make folder", folder.clone(), error))?;
    let mut unpacker = Unpacker::new(&folder, &request.limits)?;
    for (number, diff_id) in request.diff_ids.iter().enumerate() {
        let blob = layer_path(workspace, number);
        unpacker.apply(&blob, diff_id)?;
        let _ = std::fs::remove_file(&blob);
    }
    Ok(unpacker.has_holes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    /// Unpacks with a shell script in place of the process, in a folder with a file
    /// `pid`.
    async fn with_script(folder: &Path, script: &str) -> Result<bool, Error> {
        let program = folder.join("script");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        loop {
            let done = unpack(&program, folder, &Limits::default(), Vec::new(), "x:1").await;
            // A thread of another test has forked while the script was open
            // here.
            if !done.as_ref().is_err_and(|error| error.to_string().contains("Text file busy")) {
                return done;
            }
        }
    }

    #[tokio::test]
    async fn a_process_that_does_not_answer_well_is_told_with_its_words() {
        let folder = tempfile::tempdir().unwrap();
        for (script, words) in [
            ("echo oh >&2; exit 3", "exit status: 3: oh"),
            ("exec yes", "SIGPIPE"),
            ("kill -SYS $$", "signal: 31"),
            ("echo '{\"done\": {\"holes\": false}}'; exit 1", "exit status: 1"),
            ("echo '{\"jail\": \"no seccomp\"}'", "unpack: no seccomp"),
        ] {
            let pulled = tokio::time::timeout(Duration::from_secs(20), with_script(folder.path(), script));
            let error = pulled.await.unwrap().unwrap_err();
            assert!(matches!(error, Error::Unpacker { .. }), "{script}: {error}");
            assert!(error.to_string().contains(words), "{script}: {error}");
        }
        let done = with_script(folder.path(), "echo '{\"done\": {\"holes\": true}}'").await;
        assert!(done.unwrap());
    }

    #[tokio::test]
    async fn a_full_disk_is_one_on_this_side_too() {
        let folder = tempfile::tempdir().unwrap();
        let reply = Reply::Disk {
            stage: "write file".into(),
            path: "/files/etc/motd".into(),
            errno: Some(libc::ENOSPC),
            cause: String::new(),
        };
        let reply = serde_json::to_string(&reply).unwrap();
        let error = with_script(folder.path(), &format!("echo '{reply}'; exit 1")).await.unwrap_err();
        assert!(error.is_disk_full(), "{error}");
        let text = chain(&error);
        let path = folder.path().join("files/etc/motd");
        assert!(text.starts_with(&format!("write file: {}: No space left", path.display())), "{text}");
    }

    #[tokio::test]
    async fn the_process_of_a_pull_that_is_given_up_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let script = format!("echo $$ > {}; exec sleep 1000", pid.display());
        let pull = tokio::time::timeout(Duration::from_millis(500), with_script(folder.path(), &script));
        assert!(pull.await.is_err());
        let process = Path::new("/proc").join(std::fs::read_to_string(pid).unwrap().trim());
        let ends = async {
            while std::fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim() == "sleep") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), ends).await.unwrap();
    }
}
