//! Asks a pod's agent how much memory the agent itself uses.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use husk_proto::agent::agent_client::AgentClient;
use husk_proto::agent::{ContainerStatsRequest, GRPC_PORT};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::transport::Endpoint;

/// The path of a pod's vsock socket below huskd's `run_dir`.
pub fn vsock_of(run_dir: &Path, sandbox: &str) -> Option<PathBuf> {
    Some(run_dir.join("sandboxes").join(sandbox.get(..13)?).join("vsock.sock"))
}

/// Asks for the resident bytes of the agent.
pub async fn resident(vsock: PathBuf) -> anyhow::Result<u64> {
    let channel = Endpoint::from_static("http://agent")
        .timeout(Duration::from_secs(60))
        .connect_with_connector(tower::service_fn(move |_| {
            let vsock = vsock.clone();
            async move { connect(&vsock).await.map(TokioIo::new) }
        }))
        .await
        .context("connect to the agent")?;
    let answer = AgentClient::new(channel).container_stats(ContainerStatsRequest::default()).await?;
    Ok(answer.into_inner().machine.unwrap_or_default().agent_rss_bytes)
}

/// Connects through the host's side of the vsock device: `CONNECT <port>`, `OK <port>`.
async fn connect(vsock: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(vsock).await?;
    stream.write_all(format!("CONNECT {GRPC_PORT}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the line is not ours.
    while answer.last() != Some(&b'\n') {
        if answer.len() > 32 {
            return Err(io::Error::other("the vsock device gives an odd answer"));
        }
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(io::Error::other("the agent does not listen")) }
}
