//! Measures how long a command takes that does nothing.

use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;

use super::pod::{Container, Pod};
use super::websocket::{Said, Streams};
use crate::statistics::Spread;

/// Times in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Exec {
    /// Time of ExecSync.
    pub sync: Spread,
    /// Time of Exec and of the WebSocket to its URL, until the status has arrived.
    pub streamed: Spread,
}

/// Measures both in turns, after one of each that does not count.
pub async fn measure(pod: &mut Pod, container: &Container, runs: u16) -> anyhow::Result<Exec> {
    let (mut sync, mut streamed) = (Vec::new(), Vec::new());
    for run in 0..=runs {
        let started = Instant::now();
        pod.exec_sync(container, &["true"]).await?;
        let after_sync = started.elapsed();

        let started = Instant::now();
        let url = pod.exec(container, &["true"]).await?;
        succeed(&url).await.context("Exec")?;
        if run > 0 {
            sync.push(after_sync.as_secs_f64() * 1e3);
            streamed.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    let spread = |figures| Spread::of(figures).context("no command was run");
    Ok(Exec { sync: spread(sync)?, streamed: spread(streamed)? })
}

async fn succeed(url: &str) -> anyhow::Result<()> {
    let mut streams = Streams::connect(url).await?;
    loop {
        if let Said::Ended(status) = streams.next().await? {
            let status: serde_json::Value = serde_json::from_str(&status).context("read the status")?;
            ensure!(status.get("status").is_some_and(|word| word == "Success"), "it ended with {status}");
            return Ok(());
        }
    }
}
