//! The service as seen by a client whose machine stood still.

use std::sync::atomic::{AtomicUsize, Ordering};

use husk_proto::agent::agent_client::AgentClient;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::Endpoint as Address;

use super::*;
use crate::connection::Ports;

/// More requests than a connection endures with the default limit.
const GIVEN_UP: usize = 64;

/// Copies bytes, from the moment on when `go` is set.
async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWriteExt + Unpin, go: Arc<Notify>) {
    go.notified().await;
    go.notify_one();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        to.write_all(&buffer[..count]).await.unwrap();
    }
}

#[tokio::test]
async fn requests_that_were_given_up_while_the_machine_stood_still_break_no_connection() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let ports = Ports::of_socket(UnixListener::bind(&path).unwrap());
    tokio::spawn(serve(ports.grpc, Arc::new(Agent::new(Reaper::default(), Arc::default()))));
    let (connections, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let connector = tower::service_fn({
        let (connections, go) = (connections.clone(), go.clone());
        move |_| {
            connections.fetch_add(1, Ordering::Relaxed);
            let (path, go) = (path.clone(), go.clone());
            async move {
                let mut agent = UnixStream::connect(path).await?;
                agent.write_all(format!("CONNECT {}\n", husk_proto::agent::GRPC_PORT).as_bytes()).await?;
                while agent.read_u8().await? != b'\n' {}
                let (ours, theirs) = UnixStream::pair()?;
                let (from_agent, to_agent) = agent.into_split();
                let (from_client, to_client) = theirs.into_split();
                tokio::spawn(carry(from_client, to_agent, go.clone()));
                tokio::spawn(carry(from_agent, to_client, go));
                Ok::<_, std::io::Error>(TokioIo::new(ours))
            }
        }
    });
    let channel = Address::from_static("http://agent").connect_with_connector(connector).await.unwrap();
    let client = AgentClient::new(channel);
    // Nothing arrives while the machine stands still, so all arrives at once.
    for _ in 0..GIVEN_UP {
        let mut client = client.clone();
        let call =
            tokio::spawn(async move { client.container_stats(ContainerStatsRequest::default()).await });
        tokio::time::sleep(Duration::from_millis(2)).await;
        call.abort();
    }
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.hello(HelloRequest {}).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    go.notify_one();
    let answer = timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap();
    assert_eq!(answer.unwrap().into_inner().protocol, husk_proto::agent::PROTOCOL);
    assert_eq!(connections.load(Ordering::Relaxed), 1, "it is the first connection still");
}
