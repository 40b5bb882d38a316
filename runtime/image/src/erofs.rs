//! Packs a folder into an EROFS file.

use std::path::Path;
use std::time::Duration;

use tokio::process::Command;

use super::Error;

/// Most time that packing may take.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Packs `folder` into `file`, uncompressed, so that its pages are read directly from the
/// host's page cache. After an error, `file` may be there in part. With `holes`, those of
/// sparse files take no space: files are then made of chunks, which need an index (Linux
/// 5.15).
pub(super) async fn pack(folder: &Path, file: &Path, holes: bool) -> Result<(), Error> {
    let mut mkfs = Command::new("mkfs.erofs");
    // With a fixed UUID, the same files give the same bytes.
    mkfs.args(["-U", "00000000-0000-0000-0000-000000000000", "--quiet"])
        .args(holes.then_some("--chunksize=4096"))
        .arg(file)
        .arg(folder)
        .kill_on_drop(true);
    let output = tokio::time::timeout(TIMEOUT, mkfs.output())
        .await
        .map_err(|_| Error::Mkfs(format!("not done within {} s", TIMEOUT.as_secs())))?
        .map_err(|error| Error::Mkfs(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let mut text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if text.is_empty() {
        text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    }
    Err(Error::Mkfs(format!("{}: {text}", output.status)))
}
