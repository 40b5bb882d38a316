//! `husk-agent`: the first process of a pod's virtual machine.
//!
//! The kernel starts it as pid 1 with nothing mounted but the read-only root. The
//! agent serves huskd over vsock: a gRPC service to set up the pod and to run its
//! containers through runc, and one connection for each standard stream. As pid 1
//! it also reaps every process that ends, and must never end itself: the kernel
//! would panic.
//!
//! For a pod of plain host containers huskd starts the same program on the host,
//! where it serves the same over a unix socket ([`guest::mode`], [`guest::host`]).
//!
//! The folders are floors. Each uses only those above it in this list:
//!
//! | folder        | content                                                    |
//! | ------------- | ---------------------------------------------------------- |
//! | [`guest`]     | the machine or host, and interfaces of the kernel          |
//! | [`process`]   | processes, their streams and exits, and runc               |
//! | [`pod`]       | the parts that the containers of a pod share               |
//! | [`container`] | containers: files, configuration, users, limits            |
//! | [`server`]    | the RPCs, and the connections of standard streams          |

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use connection::Ports;
use guest::mode::Mode;
use guest::{host, init, power, ready};
use pod::ns;
use process::reaper;
use server::streams;

mod connection;
mod container;
mod error;
mod guest;
mod id;
mod pod;
mod process;
mod server;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(ns::PAUSE) {
        return ns::pause();
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The kernel panics when pid 1 ends; this line, just above the
            // panic on the console, says why. On the host it is in the log that
            // huskd quotes.
            eprintln!("husk-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    init::log_to_console();
    init::limit_malloc();
    let mut arguments = std::env::args_os().skip(1);
    let mode = if arguments.next().is_some_and(|first| first == host::HOST) {
        let host = host::parse(arguments)?;
        host::enter(&host)?;
        Mode::Host(host)
    } else {
        Mode::Guest
    };
    let mode = Arc::new(mode);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_stack_size(512 * 1024)
        .build()
        .context("start the event loop")?;
    runtime.block_on(serve(mode.clone()))?;
    match *mode {
        Mode::Guest => power::off(),
        Mode::Host(_) => Ok(()),
    }
}

/// Serves until the pod ends.
async fn serve(mode: Arc<Mode>) -> anyhow::Result<()> {
    let reaper = reaper::Reaper::start().context("listen for SIGCHLD")?;
    let ports = match *mode {
        Mode::Guest => {
            let ports = Ports::of_machine(std::env::args_os().skip(1))?;
            // The host may connect from now on; its connections wait in the
            // backlog for the few mounts below.
            ready::announce().await;
            init::prepare()?;
            ports
        }
        Mode::Host(_) => Ports::of_socket(host::socket().context("listen for huskd")?),
    };
    let agent = Arc::new(server::Agent::new(reaper, mode));
    let stream_server = tokio::spawn(streams::serve(ports.streams, agent.clone()));
    let served = server::serve(ports.grpc, agent).await.context("serve gRPC");
    stream_server.abort();
    served
}
