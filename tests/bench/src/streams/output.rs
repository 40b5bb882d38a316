//! Measures how fast a container's output arrives.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use super::pod::{Log, Pod};
use super::websocket::{Said, Streams};
use crate::inside::{LAST, LINE, MIB};
use crate::statistics::Spread;

/// MiB of output in a second, from the first byte that arrives to the last one.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Output {
    /// Speed of output to the log, when nobody is attached.
    pub log: Spread,
    /// Speed of output to an attached client and the log.
    pub attached: Spread,
}

pub async fn measure(pod: &mut Pod, mebibytes: u64, rounds: u16) -> anyhow::Result<Output> {
    let (mut log, mut attached) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        log.push(to_log(pod, mebibytes).await.context("output to the log")?);
        attached.push(to_client(pod, mebibytes).await.context("output to a client")?);
    }
    let spread = |figures| Spread::of(figures).context("no rounds");
    Ok(Output { log: spread(log)?, attached: spread(attached)? })
}

async fn to_log(pod: &mut Pod, mebibytes: u64) -> anyhow::Result<f64> {
    let container = pod.start("logged", &["lines", &mebibytes.to_string()], false).await?;
    container.log.wait_for(Log::has_begun).await?;
    let started = Instant::now();
    container.log.wait_for(ended).await?;
    let speed = mebibytes as f64 / started.elapsed().as_secs_f64();
    check_whole(&container.log, mebibytes)?;
    pod.remove(container).await?;
    Ok(speed)
}

async fn to_client(pod: &mut Pod, mebibytes: u64) -> anyhow::Result<f64> {
    let container = pod.start("attached", &["lines", "--wait", &mebibytes.to_string()], true).await?;
    let url = pod.attach(&container).await?;
    let mut streams = Streams::connect(&url).await?;
    streams.send("go\n").await?;
    let (mut started, mut left) = (None, mebibytes * MIB);
    while left > 0 {
        match streams.next().await? {
            Said::Output(bytes) => {
                left = left.checked_sub(bytes).context("there is more output than there was")?
            }
            Said::Ended(status) => bail!("{left} bytes did not arrive: {status}"),
        }
        started.get_or_insert_with(Instant::now);
    }
    let started = started.context("there was no output")?;
    let speed = mebibytes as f64 / started.elapsed().as_secs_f64();
    container.log.wait_for(ended).await?;
    check_whole(&container.log, mebibytes)?;
    pod.remove(container).await?;
    Ok(speed)
}

/// Whether the last line is there.
fn ended(log: &Log) -> std::io::Result<bool> {
    let mut file = File::open(&log.path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(2 * LINE as u64)))?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail)?;
    Ok(tail.ends_with(b"\n") && String::from_utf8_lossy(&tail).contains(&format!(" stdout F {LAST}x")))
}

/// A lost line would make the measured speed too high.
fn check_whole(log: &Log, mebibytes: u64) -> anyhow::Result<()> {
    let lines = BufReader::new(File::open(&log.path).context("open a log")?).split(b'\n').count() as u64;
    let wanted = mebibytes * MIB / LINE as u64;
    ensure!(lines == wanted, "the log has {lines} lines of {wanted}");
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;

    const PREFIX: &str = "2026-11-01T12:00:00.000000001Z stdout F ";

    #[tokio::test]
    async fn a_log_has_ended_with_its_last_line_and_is_whole_with_all_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log { path: folder.path().join("log"), timeout: Duration::from_millis(100) };
        let line = |text: &str| format!("{PREFIX}{text:x<width$}\n", width = LINE - 1);
        let all = MIB as usize / LINE;
        let mut text = line("").repeat(all - 1);
        std::fs::write(&log.path, &text).unwrap();
        assert!(!ended(&log).unwrap() && check_whole(&log, 1).is_err());
        assert!(log.wait_for(ended).await.is_err());

        text += &line(LAST);
        std::fs::write(&log.path, &text[..text.len() - 1]).unwrap();
        assert!(!ended(&log).unwrap());
        std::fs::write(&log.path, &text).unwrap();
        log.wait_for(ended).await.unwrap();
        check_whole(&log, 1).unwrap();
        assert!(check_whole(&log, 2).is_err());
    }
}
