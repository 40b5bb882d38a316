//! `husk-agent`: the first process of a pod's virtual machine.
//!
//! The kernel starts it as pid 1 with nothing mounted but the read-only root.
//! It answers huskd over vsock: a gRPC service to set up the pod and to run
//! its containers through runc ([`server`]), and one connection for each
//! standard stream ([`streams`]). As pid 1 it also reaps every process that
//! ends ([`reaper`]), and must never end itself: the kernel would panic.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use husk_proto::agent::{GRPC_PORT, STREAM_PORT};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

mod bundle;
mod cgroup;
mod clock;
mod container;
mod disks;
mod etc;
mod fd;
mod id;
mod images;
mod init;
mod machine;
mod mounts;
mod netlink;
mod ns;
mod power;
mod process;
mod pump;
mod ready;
mod reaper;
mod resources;
mod runc;
mod server;
mod spec;
mod stdio;
mod streams;
mod sysctl;
mod usage;
mod user;
mod userns;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(ns::PAUSE) {
        return ns::pause();
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The kernel panics when pid 1 ends; this line, just above the
            // panic on the console, says why.
            eprintln!("husk-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    init::log_to_console();
    init::limit_malloc();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_stack_size(512 * 1024)
        .build()
        .context("start the event loop")?;
    runtime.block_on(serve())?;
    power::off()
}

/// Serves until [`power`] has been asked to end the machine.
async fn serve() -> anyhow::Result<()> {
    let reaper = reaper::Reaper::start().context("listen for SIGCHLD")?;
    let grpc = listen(GRPC_PORT)?;
    let streams = listen(STREAM_PORT)?;
    // The host may connect from here on; its connections wait in the backlog
    // for the few mounts below.
    ready::announce().await;
    init::prepare()?;

    let agent = Arc::new(server::Agent::new(reaper));
    let stream_server = tokio::spawn(streams::serve(streams, agent.clone()));
    let served = server::serve(grpc, agent).await.context("serve gRPC");
    stream_server.abort();
    served
}

fn listen(port: u32) -> anyhow::Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .with_context(|| format!("listen on vsock port {port}; is CONFIG_VSOCKETS in the guest kernel?"))
}
