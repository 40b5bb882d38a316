//! Signals that ask this process to end.

use anyhow::{Context, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Counts SIGINT, SIGTERM and SIGHUP, which do not end this process any more.
#[derive(Clone, Debug)]
pub struct Interrupts(watch::Receiver<u32>);

impl Interrupts {
    /// Begins to count.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> anyhow::Result<Self> {
        let (count, counted) = watch::channel(0);
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
            let mut signals = signal(kind).context("listen for signals")?;
            let count = count.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    count.send_modify(|count| *count += 1);
                }
            });
        }
        Ok(Self(counted))
    }

    /// Returns when one more has come.
    pub async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// Whether none has come.
    ///
    /// # Errors
    /// One has.
    pub fn check(&self) -> anyhow::Result<()> {
        match *self.0.borrow() {
            0 => Ok(()),
            _ => bail!("interrupted"),
        }
    }
}
