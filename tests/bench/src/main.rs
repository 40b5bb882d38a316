//! `husk-bench` measures how long a pod's steps take, how much memory a pod
//! uses, how fast its streams and volumes are, and how fast a machine boots.
//!
//! `pods` speaks CRI itself, so that the figures do not contain the start of a
//! client. It can measure any other runtime that serves CRI on this machine too:
//!
//! ```text
//! husk-bench pods --image 127.0.0.1:5000/husk/busybox:1 \
//!     --peer kata=unix:///run/containerd/containerd.sock,kata
//! ```
//!
//! `streams` measures the streams and volumes of a running container. It is itself
//! the program in that container (`inside`), so it must be linked statically.
//!
//! `boot` needs no runtime, only KVM: it starts `husk-vmm`, and Firecracker if it
//! is on the PATH, with the same guest.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use serde::Serialize;

mod agent;
mod boot;
mod cri;
mod inside;
mod memory;
mod processes;
mod report;
mod run;
mod statistics;
mod streams;

use cri::Target;

/// Measures the start of pods and machines, and the memory that they cost.
#[derive(Debug, Parser)]
#[command(name = "husk-bench", version)]
enum Arguments {
    /// Measures pods over CRI: one to warm up, then some one by one, then as many at once.
    Pods(Pods),
    /// Measures commands, output, forwarded ports and volumes of a running container, over CRI.
    Streams(Streams),
    /// Does the work that `streams` measures, inside a container.
    #[command(subcommand, hide = true)]
    Inside(inside::Inside),
    /// Measures the time from the start of a VMM until the agent in its guest is ready.
    Boot(Boot),
}

/// The runtimes to measure.
#[derive(Debug, clap::Args)]
pub struct Runtimes {
    /// Husk's CRI socket.
    #[arg(long, default_value = "unix:///run/husk/husk.sock")]
    endpoint: String,
    /// The runtime handler of the pods; the empty one is the default.
    #[arg(long, default_value = "kata-runtime")]
    handler: String,
    /// Another runtime to measure in the same way: NAME=ENDPOINT[,HANDLER].
    #[arg(long, value_name = "PEER")]
    peer: Vec<Target>,
    /// The image of the containers, one with `sleep`, `echo` and `true` in it. It is pulled.
    #[arg(long)]
    pub image: String,
    /// Most seconds that one request may take.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
}

impl Runtimes {
    /// All runtimes, Husk first.
    pub fn targets(&self) -> impl Iterator<Item = Target> {
        let (endpoint, handler) = (self.endpoint.clone(), self.handler.clone());
        std::iter::once(Target { name: "husk".into(), endpoint, handler }).chain(self.peer.iter().cloned())
    }

    /// The time limit of one request.
    pub const fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

#[derive(Debug, clap::Args)]
struct Pods {
    #[command(flatten)]
    runtimes: Runtimes,
    /// huskd's `run_dir`, to ask the agents for their memory.
    #[arg(long, default_value = "/run/husk")]
    run_dir: PathBuf,
    /// How many pods one after another, and how many at once.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=200))]
    pods: u16,
    /// The directory for the figures.
    #[arg(long, default_value = "target/bench/startup.json")]
    json: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Streams {
    #[command(flatten)]
    runtimes: Runtimes,
    #[command(flatten)]
    plan: streams::Plan,
    /// The directory for the figures.
    #[arg(long, default_value = "target/bench/streams.json")]
    json: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Boot {
    #[command(flatten)]
    guest: boot::Guest,
    /// The `husk-vmm` program.
    #[arg(long, default_value = "target/release/husk-vmm")]
    vmm: PathBuf,
    /// Number of boots with each VMM.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// The directory for the figures.
    #[arg(long, default_value = "target/bench/boot.json")]
    json: PathBuf,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse() {
        Arguments::Boot(arguments) => boot(&arguments),
        Arguments::Inside(inside) => inside.run(),
        Arguments::Pods(arguments) => with_threads(pods(arguments)),
        Arguments::Streams(arguments) => with_threads(streams(arguments)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn with_threads(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start threads")?;
    runtime.block_on(work)
}

async fn pods(arguments: Pods) -> anyhow::Result<()> {
    let plan = run::Plan {
        image: arguments.runtimes.image.clone(),
        pods: arguments.pods,
        timeout: arguments.runtimes.timeout(),
        run_dir: arguments.run_dir,
    };
    let mut results = Vec::new();
    for target in arguments.runtimes.targets() {
        let name = target.name.clone();
        results.push(run::measure(target, &plan).await.with_context(|| format!("measure {name}"))?);
    }
    write(&arguments.json, &results)?;
    print!("{}", report::render(&results));
    println!("\nall figures: {}", arguments.json.display());
    Ok(())
}

async fn streams(arguments: Streams) -> anyhow::Result<()> {
    let results = streams::measure(&arguments.runtimes, &arguments.plan).await?;
    write(&arguments.json, &results)?;
    print!("{}", streams::render(&results));
    println!("\nall figures: {}", arguments.json.display());
    Ok(())
}

fn boot(arguments: &Boot) -> anyhow::Result<()> {
    let firecracker = boot::firecracker_on_path();
    let results = boot::measure(&arguments.guest, &arguments.vmm, firecracker, arguments.runs)?;
    write(&arguments.json, &results)?;
    print!("{}", boot::render(&results));
    println!("\nall figures: {}", arguments.json.display());
    Ok(())
}

fn write(path: &Path, results: &impl Serialize) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_vec_pretty(results).context("write figures")?;
    std::fs::write(path, json).with_context(|| format!("write {}", path.display()))
}
