//! Measures how fast bytes go through a forwarded port, with crictl as the client.

use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::inside::{MIB, Order};
use crate::statistics::Spread;

/// The port on which the pod's server listens.
pub const PORT: u16 = 8001;

/// Speeds in MiB a second.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ports {
    /// Speed from the pod, from the first byte that arrives to the last one.
    pub from_pod: Spread,
    /// Speed to the pod, until the pod reports that it has all bytes.
    pub to_pod: Spread,
}

pub async fn measure(
    crictl: &Path,
    endpoint: &str,
    sandbox: &str,
    mebibytes: u64,
    rounds: u16,
) -> anyhow::Result<Ports> {
    let (_forward, local) = forward(crictl, endpoint, sandbox).await.context("crictl port-forward")?;
    let (mut from_pod, mut to_pod) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        from_pod.push(take(local, mebibytes).await.context("take bytes from the pod")?);
        to_pod.push(give(local, mebibytes).await.context("give the pod bytes")?);
    }
    let spread = |figures| Spread::of(figures).context("no rounds");
    Ok(Ports { from_pod: spread(from_pod)?, to_pod: spread(to_pod)? })
}

/// The client, which ends when it is dropped, and the port that it listens on.
async fn forward(crictl: &Path, endpoint: &str, sandbox: &str) -> anyhow::Result<(Child, u16)> {
    let mut child = Command::new(crictl)
        .args([
            "--config",
            "/dev/null",
            "--runtime-endpoint",
            endpoint,
            "--timeout",
            "300s",
            "port-forward",
            sandbox,
        ])
        .arg(format!(":{PORT}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("start {}", crictl.display()))?;
    let mut output = BufReader::new(child.stdout.take().context("it has no output")?).lines();
    let said = output.next_line().await.context("hear it")?.context("it ended early")?;
    // crictl prints a line for each connection, and must not be blocked.
    tokio::spawn(async move { while let Ok(Some(_)) = output.next_line().await {} });
    let port = local_port(&said).with_context(|| format!("it said {said:?}"))?;
    Ok((child, port))
}

/// Parses `Forwarding from 127.0.0.1:43210 -> 8001`.
fn local_port(said: &str) -> Option<u16> {
    let (_, rest) = said.split_once("127.0.0.1:")?;
    rest.split_once(" -> ")?.0.parse().ok()
}

async fn take(port: u16, mebibytes: u64) -> anyhow::Result<f64> {
    let mut stream = order(port, Order::Give(mebibytes * MIB)).await?;
    let mut piece = vec![0; 65536];
    let (mut started, mut left) = (None, mebibytes * MIB);
    while left > 0 {
        let length = stream.read(&mut piece).await?;
        ensure!(length > 0, "{left} bytes did not arrive");
        left = left.saturating_sub(length as u64);
        started.get_or_insert_with(Instant::now);
    }
    let started = started.context("nothing was asked for")?;
    Ok(mebibytes as f64 / started.elapsed().as_secs_f64())
}

async fn give(port: u16, mebibytes: u64) -> anyhow::Result<f64> {
    let mut stream = order(port, Order::Take(mebibytes * MIB)).await?;
    let piece = vec![0; MIB as usize];
    let started = Instant::now();
    for _ in 0..mebibytes {
        stream.write_all(&piece).await?;
    }
    stream.read_u8().await.context("hear that all has arrived")?;
    Ok(mebibytes as f64 / started.elapsed().as_secs_f64())
}

async fn order(port: u16, order: Order) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(&order.encode()).await?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crictl_says_where_it_listens() {
        assert_eq!(local_port("Forwarding from 127.0.0.1:43210 -> 8001"), Some(43210));
        assert_eq!(local_port("Forwarding from [::1]:43210 -> 8001"), None);
        assert_eq!(local_port("Forwarding from 127.0.0.1:0"), None);
    }
}
