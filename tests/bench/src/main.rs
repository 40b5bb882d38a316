//! `husk-bench`: how long a pod's steps take, and what a pod costs in memory.
//!
//! It speaks CRI itself, so no client's own start is in the figures, and it
//! can run the same against any other runtime that serves CRI on this machine:
//!
//! ```text
//! husk-bench --image 127.0.0.1:5000/husk/busybox:1 \
//!     --peer kata=unix:///run/containerd/containerd.sock,kata
//! ```
//!
//! The runtimes are there already. Each in turn gets one pod that warms it up,
//! then `--pods` pods one after another, then as many at once.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

mod agent;
mod cri;
mod memory;
mod processes;
mod report;
mod run;
mod statistics;

use cri::Target;

/// Measures the start of pods, and the memory that they cost.
#[derive(Debug, Parser)]
#[command(name = "husk-bench", version)]
struct Arguments {
    /// Husk's CRI socket.
    #[arg(long, default_value = "unix:///run/husk/husk.sock")]
    endpoint: String,
    /// The runtime handler of the pods; the empty one is the default.
    #[arg(long, default_value = "kata-runtime")]
    handler: String,
    /// Another runtime to measure in the same way: NAME=ENDPOINT[,HANDLER].
    #[arg(long, value_name = "PEER")]
    peer: Vec<Target>,
    /// The image of the containers, one with a `sleep` in it. It is pulled.
    #[arg(long)]
    image: String,
    /// How many pods one after another, and how many at once.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=200))]
    pods: u16,
    /// Most seconds that one request may take.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// Where the figures go.
    #[arg(long, default_value = "target/bench/startup.json")]
    json: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start threads")
        .and_then(|runtime| runtime.block_on(bench(arguments)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench(arguments: Arguments) -> anyhow::Result<()> {
    let husk = Target { name: "husk".into(), endpoint: arguments.endpoint, handler: arguments.handler };
    let mut results = Vec::new();
    for target in std::iter::once(husk).chain(arguments.peer) {
        let plan = run::Plan {
            image: arguments.image.clone(),
            pods: arguments.pods,
            timeout: std::time::Duration::from_secs(arguments.timeout),
        };
        let name = target.name.clone();
        results.push(run::measure(target, &plan).await.with_context(|| format!("measure {name}"))?);
    }
    if let Some(folder) = arguments.json.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_vec_pretty(&results).context("write figures")?;
    std::fs::write(&arguments.json, json).with_context(|| format!("write {}", arguments.json.display()))?;
    print!("{}", report::render(&results));
    println!("\nall figures: {}", arguments.json.display());
    Ok(())
}
