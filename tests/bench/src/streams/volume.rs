//! Does the same work on files inside a container, and on the same directory of the host.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};

use super::pod::{Container, Pod, VOLUME};
use crate::inside::files::{Amount, Speeds};

/// Works in the volume, inside the container.
pub async fn measure(pod: &mut Pod, container: &Container, amount: Amount) -> anyhow::Result<Speeds> {
    let started = Instant::now();
    let words = words(VOLUME, amount);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let printed = pod.inside(container, &words).await.context("work on files in the container")?;
    let (speeds, here) = (read(&printed)?, started.elapsed().as_secs_f64());
    ensure!(speeds.seconds <= here, "a guest's clock counts {} s in {here} s", speeds.seconds);
    Ok(speeds)
}

/// Works in this directory, on the host.
pub async fn on_host(folder: &Path, amount: Amount) -> anyhow::Result<Speeds> {
    let program = std::env::current_exe().context("find this program")?;
    let output = tokio::process::Command::new(program)
        .arg("inside")
        .args(words(&folder.display().to_string(), amount))
        .output()
        .await
        .context("start this program")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "work on files: {}: {errors}", output.status);
    read(&output.stdout)
}

fn words(folder: &str, amount: Amount) -> [String; 8] {
    let Amount { files, file_mib, rounds } = amount;
    let number = |value: u64| value.to_string();
    [
        "files".into(),
        folder.into(),
        "--files".into(),
        number(files.into()),
        "--file-mib".into(),
        number(file_mib),
        "--rounds".into(),
        number(rounds.into()),
    ]
}

fn read(printed: &[u8]) -> anyhow::Result<Speeds> {
    serde_json::from_slice(printed)
        .with_context(|| format!("it printed {:?}", String::from_utf8_lossy(printed)))
}
