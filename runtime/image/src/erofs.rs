//! Packs the files of a pull into an EROFS file.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use husk_spawn::helper;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::Error;
use super::unpack::{NAME, PACK, PACKED};

/// Most time that packing may take.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Most bytes of each of its streams that are read.
const MAX_WORDS: u64 = 4 << 10;

/// Packs the unpacked files in the folder of a pull, uncompressed, so that the pages of the
/// EROFS file are read directly from the host's page cache. Returns the path of that file.
/// After an error, it may be there in part. `program` is huskd, which runs `mkfs.erofs` in a
/// jail; `most` is the most bytes that the files have. With `holes`, those of sparse files
/// take no space: files are then made of chunks, which need an index (Linux 5.15).
pub(super) async fn pack(program: &Path, workspace: &Path, most: u64, holes: bool) -> Result<PathBuf, Error> {
    let broken = |error: std::io::Error| Error::Mkfs(error.to_string());
    // Inodes, names and attributes come on top.
    let largest = most.saturating_mul(2);
    let mut child = Command::from(helper(program))
        .arg0(NAME)
        .arg(PACK)
        .arg(workspace)
        .arg(largest.to_string())
        // With a fixed UUID, the same files give the same bytes.
        .args(["-U", "00000000-0000-0000-0000-000000000000", "--quiet"])
        .args(holes.then_some("--chunksize=4096"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(broken)?;
    let (stdout, stderr) = (words(child.stdout.take()), words(child.stderr.take()));
    let ended = async { tokio::join!(stdout, stderr, child.wait()) };
    let (stdout, stderr, status) = tokio::time::timeout(TIMEOUT, ended)
        .await
        .map_err(|_| Error::Mkfs(format!("not done within {} s", TIMEOUT.as_secs())))?;
    let status = status.map_err(broken)?;
    if status.success() {
        return Ok(workspace.join(PACKED));
    }
    let text = if stderr.is_empty() { stdout } else { stderr };
    Err(Error::Mkfs(format!("{status}: {text}")))
}

/// The output of a program, up to a bound, as a line of text. A program that writes more
/// ends, because the pipe is closed.
async fn words(stream: Option<impl AsyncRead + Unpin>) -> String {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        let _ = stream.take(MAX_WORDS).read_to_end(&mut bytes).await;
    }
    let text = String::from_utf8_lossy(&bytes);
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
