//! Connections from the host to ports of the pod.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long each of the pod's loopback addresses may take to answer.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// Most connections at a time.
const MAX_FORWARDS: usize = 256;

/// Bytes held for each direction.
const BUFFER: usize = 16 * 1024;

static FORWARDS: AtomicUsize = AtomicUsize::new(0);

/// A port that has taken the connection.
pub struct Target {
    socket: TcpStream,
    _place: Place,
}

/// One of [`MAX_FORWARDS`].
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let free = |count: usize| count.checked_add(1).filter(|count| *count <= MAX_FORWARDS);
        FORWARDS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok().map(|_| Self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        FORWARDS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connects to a port on the pod's loopback: IPv4 first, then IPv6, as a
/// server on `localhost` may have either.
pub async fn connect(port: u16) -> Result<Target, String> {
    let place = Place::take().ok_or_else(|| format!("{MAX_FORWARDS} connections are forwarded already"))?;
    let dial = async |address: SocketAddr| {
        timeout(CONNECT_DEADLINE, TcpStream::connect(address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    };
    let first = match dial((Ipv4Addr::LOCALHOST, port).into()).await {
        Ok(socket) => return Ok(Target { socket, _place: place }),
        Err(error) => error,
    };
    match dial((Ipv6Addr::LOCALHOST, port).into()).await {
        Ok(socket) => Ok(Target { socket, _place: place }),
        Err(_) => Err(format!("connect to port {port} on localhost inside the pod: {first}")),
    }
}

/// A host and a port that are to be joined.
pub struct Forward<C> {
    /// The host's connection.
    pub host: C,
    /// The port's.
    pub target: Target,
    /// What the host sent together with its greeting.
    pub early: Vec<u8>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Forward<C> {
    /// Copies both ways until both have ended, each alone.
    pub async fn copy(self) {
        let Self { mut host, mut target, early } = self;
        let socket = &mut target.socket;
        let _ = socket.set_nodelay(true);
        if socket.write_all(&early).await.is_err() {
            return;
        }
        drop(early);
        // Either may break off at any time; the other is then closed.
        let _ = copy_bidirectional_with_sizes(&mut host, socket, BUFFER, BUFFER).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use tokio::io::{AsyncReadExt, duplex};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn each_way_ends_alone_and_nothing_is_lost() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = connect(listener.local_addr().unwrap().port()).await.unwrap();
        let (mut pod, _) = listener.accept().await.unwrap();
        let (mut client, host) = duplex(64);
        let copying = tokio::spawn(Forward { host, target, early: b"early ".to_vec() }.copy());
        client.write_all(b"late").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = String::new();
        pod.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "early late");
        pod.write_all(b"answer after the question's end").await.unwrap();
        drop(pod);
        heard.clear();
        client.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "answer after the question's end");
        copying.await.unwrap();
    }

    #[tokio::test]
    async fn a_server_on_ipv6_alone_is_found() {
        // Where the machine has no IPv6 there is nothing to find.
        let Ok(listener) = TcpListener::bind("[::1]:0").await else { return };
        assert!(connect(listener.local_addr().unwrap().port()).await.is_ok());
    }

    #[tokio::test]
    async fn a_port_without_a_server_is_refused_in_words() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let refused = connect(port).await.err().unwrap();
        assert!(refused.contains(&port.to_string()) && refused.contains("refused"), "{refused}");
    }
}
