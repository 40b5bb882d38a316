//! Sources of connections. In a machine, connections come to ports of the vsock
//! device. On the host they come to one unix socket, and huskd names the port
//! in the first line, as it does to the VMM (`CONNECT <port>`, `OK <port>`).

use std::ffi::OsString;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use futures::Stream;
use husk_proto::agent::{GRPC_PORT, LIVENESS_PORT, STREAM_PORT};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};
use tonic::transport::server::Connected;

/// How long a connection may take to name its port.
const PREAMBLE_DEADLINE: Duration = Duration::from_secs(5);

/// Most connections that have not named their port. Further ones wait in the
/// backlog.
const MAX_UNDECIDED: usize = 64;

/// The argument that names the vsock peer which a machine's agent serves in
/// place of the host, for tests without a VMM. The kernel passes on only the
/// text that the host has written after `--` on its command line, so nobody in
/// the pod can set it.
const PEER: &str = "--vsock-peer";

/// Most bytes of `CONNECT <port>`.
const MAX_PREAMBLE: usize = 32;

trait Duplex: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}

/// A connection to huskd.
pub struct Connection(Pin<Box<dyn Duplex>>);

impl Connection {
    fn new(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        Self(Box::pin(stream))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

/// An endless stream of connections to one port.
pub type Incoming = Pin<Box<dyn Stream<Item = io::Result<Connection>> + Send>>;

/// The two ports of the agent.
pub struct Ports {
    /// Connections to the gRPC service.
    pub grpc: Incoming,
    /// Connections to standard streams.
    pub streams: Incoming,
}

impl Ports {
    /// Listens on the ports of a machine, for the host alone. A client of these
    /// ports controls the whole pod, and a kernel with vsock's loopback lets
    /// every process of the pod connect.
    pub fn of_machine(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<Self> {
        let peer = peer(arguments)?;
        let listen = |port| -> anyhow::Result<Incoming> {
            let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).with_context(|| {
                format!("listen on vsock port {port}; is CONFIG_VSOCKETS in the guest kernel?")
            })?;
            Ok(of_peer(listener, peer))
        };
        Ok(Self { grpc: listen(GRPC_PORT)?, streams: listen(STREAM_PORT)? })
    }

    /// Listens for both ports on a unix socket, as a task of the current runtime.
    pub fn of_socket(listener: UnixListener) -> Self {
        let (grpc, grpc_incoming) = mpsc::channel(1);
        let (streams, streams_incoming) = mpsc::channel(1);
        tokio::spawn(accept(listener, grpc, streams));
        Self {
            grpc: Box::pin(ReceiverStream::new(grpc_incoming)),
            streams: Box::pin(ReceiverStream::new(streams_incoming)),
        }
    }
}

/// The peer that is served: the host, unless the arguments name another one.
fn peer(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<u32> {
    let mut arguments = arguments.into_iter();
    if arguments.next().is_none_or(|first| first != PEER) {
        return Ok(VMADDR_CID_HOST);
    }
    let value = arguments.next().unwrap_or_default();
    value.to_string_lossy().parse().with_context(|| format!("{PEER} {}", value.display()))
}

/// The connections that `peer` makes to a port.
fn of_peer(listener: VsockListener, peer: u32) -> Incoming {
    Box::pin(futures::stream::unfold(listener, move |listener| async move {
        loop {
            let accepted = listener.accept().await;
            if let Some(connection) = admitted(accepted, peer) {
                return Some((connection.map(Connection::new), listener));
            }
        }
    }))
}

/// A connection of `peer`, or the reason that none could be accepted. A
/// connection of any other peer is closed: `None`. That is not logged, or a
/// container could fill the console.
fn admitted<C>(accepted: io::Result<(C, VsockAddr)>, peer: u32) -> Option<io::Result<C>> {
    match accepted {
        Ok((connection, address)) => (address.cid() == peer).then_some(Ok(connection)),
        Err(error) => Some(Err(error)),
    }
}

type PortSender = mpsc::Sender<io::Result<Connection>>;

async fn accept(listener: UnixListener, grpc: PortSender, streams: PortSender) {
    let undecided = std::sync::Arc::new(Semaphore::new(MAX_UNDECIDED));
    loop {
        let Ok(permit) = undecided.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((mut connection, _)) => {
                let (grpc, streams) = (grpc.clone(), streams.clone());
                tokio::spawn(async move {
                    let port = timeout(PREAMBLE_DEADLINE, preamble(&mut connection)).await;
                    drop(permit);
                    let sender = match port {
                        Ok(Ok(GRPC_PORT)) => grpc,
                        Ok(Ok(STREAM_PORT)) => streams,
                        Ok(Ok(LIVENESS_PORT)) => return hold_open(connection).await,
                        // The connection is closed without an answer, as the
                        // VMM does.
                        _ => return,
                    };
                    let _ = sender.send(Ok(Connection::new(connection))).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Reads the port that the connection is for, and confirms it.
async fn preamble(connection: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<u32> {
    let mut line = Vec::with_capacity(MAX_PREAMBLE);
    // Read byte by byte: the bytes behind the line belong to the port.
    while line.last() != Some(&b'\n') {
        if line.len() >= MAX_PREAMBLE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.push(connection.read_u8().await?);
    }
    let port = wanted(&line).ok_or(io::ErrorKind::InvalidData)?;
    connection.write_all(format!("OK {port}\n").as_bytes()).await?;
    Ok(port)
}

/// The port in `CONNECT <port>\n`, if the agent has it.
fn wanted(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let port = line.strip_prefix("CONNECT ")?.trim_end().parse().ok()?;
    [GRPC_PORT, STREAM_PORT, LIVENESS_PORT].contains(&port).then_some(port)
}

/// Keeps a connection open. Its end tells huskd that the agent has ended.
async fn hold_open(mut connection: UnixStream) {
    let _ = connection.read_u8().await;
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use proptest::prelude::*;

    use super::*;

    async fn connect(path: &std::path::Path, line: &str) -> (UnixStream, String) {
        let mut client = UnixStream::connect(path).await.unwrap();
        client.write_all(line.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            match client.read_u8().await {
                Ok(byte) => answer.push(byte),
                Err(_) => break,
            }
        }
        (client, String::from_utf8(answer).unwrap())
    }

    #[test]
    fn the_host_alone_may_connect() {
        let from = |cid| admitted(Ok(((), VsockAddr::new(cid, 1))), VMADDR_CID_HOST);
        assert!(matches!(from(VMADDR_CID_HOST), Some(Ok(()))));
        for cid in [0, 1, 3, 4711, u32::MAX] {
            assert!(from(cid).is_none(), "{cid}");
        }
        let failed: io::Result<((), VsockAddr)> = Err(io::ErrorKind::ConnectionAborted.into());
        assert!(matches!(admitted(failed, VMADDR_CID_HOST), Some(Err(_))));
    }

    #[test]
    fn the_peer_is_the_host_unless_the_command_line_says_otherwise() {
        let peer = |words: &str| peer(words.split_whitespace().map(OsString::from));
        for words in ["", "single", "quiet --vsock-peer 1"] {
            assert_eq!(peer(words).unwrap(), VMADDR_CID_HOST, "{words}");
        }
        assert_eq!(peer("--vsock-peer 1").unwrap(), 1);
        assert!(peer("--vsock-peer").is_err() && peer("--vsock-peer x").is_err());
    }

    #[tokio::test]
    async fn a_client_says_which_port_it_wants() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut ports = Ports::of_socket(UnixListener::bind(&path).unwrap());

        let (mut client, answer) = connect(&path, &format!("CONNECT {STREAM_PORT}\n")).await;
        assert_eq!(answer, format!("OK {STREAM_PORT}\n"));
        client.write_all(b"hello").await.unwrap();
        let mut served = ports.streams.next().await.unwrap().unwrap();
        let mut received = [0; 5];
        served.read_exact(&mut received).await.unwrap();
        assert_eq!(&received, b"hello");

        let (_client, answer) = connect(&path, &format!("CONNECT {GRPC_PORT}\n")).await;
        assert_eq!(answer, format!("OK {GRPC_PORT}\n"));
        assert!(ports.grpc.next().await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn a_port_that_is_not_there_is_refused_by_closing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _ports = Ports::of_socket(UnixListener::bind(&path).unwrap());
        for line in ["CONNECT 22\n", "GET / HTTP/1.1\r\n", &"x".repeat(MAX_PREAMBLE)] {
            assert_eq!(connect(&path, line).await.1, "", "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_preamble_is_survived(line in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = wanted(&line);
        }
    }
}
