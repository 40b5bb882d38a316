//! `huskd`: the CRI server of a node. Everything is wired here, and nothing owned.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use husk_base::{blocking, chain};
use husk_config::{Config, Handler};
use husk_image::unpack;
use husk_pods::{Node, ops};
use tokio::signal::unix::{SignalKind, signal};

mod heap;
mod instance;
mod telemetry;

use instance::Instance;

/// How long threads may take to end that nobody waits for any more.
const LAST_THREADS: Duration = Duration::from_secs(2);

/// Serves CRI on a node, and runs its pods in virtual machines.
#[derive(Debug, Parser)]
#[command(name = "huskd", version)]
struct Arguments {
    /// The configuration file. Without the file, every key has its default.
    #[arg(long, default_value = "/etc/husk/config.toml", env = "HUSK_CONFIG")]
    config: PathBuf,
}

fn main() -> anyhow::Result<ExitCode> {
    // Under another name it is the process that unpacks the layers of an image.
    if unpack::is_asked() {
        return Ok(unpack::main());
    }
    heap::configure();
    let arguments = Arguments::parse();
    telemetry::start();
    // The one TLS provider that is linked; a second call would be the error.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(512)
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
        .context("start threads")?;
    let ended = runtime.block_on(run(arguments));
    // The next start removes what a thread has not yet removed.
    runtime.shutdown_timeout(LAST_THREADS);
    ended.map(|()| ExitCode::SUCCESS)
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let config = Config::load(&arguments.config)?;
    // Before anything is looked at or made: another huskd may be at work here.
    let _instance = Instance::claim(&config).await?;
    let node = Arc::new(blocking(move || Node::open(config)).await?);
    ops::recover(&node).await.context("recover what an earlier huskd left")?;
    // The first pod shall not wait for what every pod needs.
    let handlers = || node.config.handlers.values().filter_map(Handler::vm);
    for handler in handlers() {
        if let Err(error) = node.disks.prepared(handler.disk_mib).await {
            let error = chain(&error);
            tracing::warn!(
                error,
                "failed to prepare sandbox disks; no pod of a VM starts until this is fixed"
            );
        }
    }
    node.templates.recover().await;
    let (templates, handlers) = (node.templates.clone(), handlers().cloned().collect::<Vec<_>>());
    let preparing = tokio::spawn(async move {
        for handler in handlers {
            templates.prepare(&handler).await;
        }
    });
    let templates = node.templates.clone();
    let streaming = tokio::spawn(node.streaming.clone().serve());
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let served = husk_cri::serve(node, heap::trim, async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; pods live on");
    })
    .await;
    preparing.abort();
    templates.end_making().await;
    streaming.abort();
    served
}
