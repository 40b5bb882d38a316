//! Tells the host that the agent's services are listening.

use std::io;
use std::time::Duration;

use husk_proto::agent::READY_PORT;
use nix::time::{ClockId, clock_gettime};
use tokio::io::AsyncWriteExt;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

/// How long the agent waits for the host to take the connection.
const READY_TIMEOUT: Duration = Duration::from_secs(1);

/// Sends `READY <microseconds since the kernel started>`. A host that does not
/// listen is no failure: it finds the service by connecting to it.
pub async fn announce() {
    match tokio::time::timeout(READY_TIMEOUT, send()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "failed to report the agent as ready"),
        Err(_) => tracing::debug!("timed out reporting the agent as ready"),
    }
}

async fn send() -> io::Result<()> {
    let mut host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)).await?;
    let since_start = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    host.write_all(format!("READY {}\n", since_start.as_micros()).as_bytes()).await?;
    host.shutdown(std::net::Shutdown::Both)
}
