//! Connections from the host to ports of the pod (port-forward).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How long each of the pod's loopback addresses may take to accept.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// Most connections at a time.
const MAX_FORWARDS: usize = 256;

/// Bytes of the buffer for each direction.
const BUFFER: usize = 16 * 1024;

/// How often to check that the host is still there while the port is silent.
const LOOK: Duration = Duration::from_secs(10);

/// How long a port that has sent its whole answer may take no more of the
/// host's bytes.
const IGNORED: Duration = Duration::from_secs(3600);

static FORWARDS: AtomicUsize = AtomicUsize::new(0);

/// An accepted connection to a port.
pub struct Target {
    socket: TcpStream,
    _permit: Permit,
}

/// The permit of one connection, of at most [`MAX_FORWARDS`].
struct Permit;

impl Permit {
    fn take() -> Option<Self> {
        let free = |count: usize| count.checked_add(1).filter(|count| *count <= MAX_FORWARDS);
        FORWARDS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok().map(|_| Self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        FORWARDS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connects to a port on the pod's loopback: IPv4 first, then IPv6, because a
/// server on `localhost` may use either.
pub async fn connect(port: u16) -> Result<Target, String> {
    let permit = Permit::take().ok_or_else(|| format!("{MAX_FORWARDS} connections are forwarded already"))?;
    let dial = async |address: SocketAddr| {
        timeout(CONNECT_DEADLINE, TcpStream::connect(address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    };
    let first = match dial((Ipv4Addr::LOCALHOST, port).into()).await {
        Ok(socket) => return Ok(Target { socket, _permit: permit }),
        Err(error) => error,
    };
    match dial((Ipv6Addr::LOCALHOST, port).into()).await {
        Ok(socket) => Ok(Target { socket, _permit: permit }),
        Err(_) => Err(format!("connect to port {port} on localhost inside the pod: {first}")),
    }
}

/// A connection of the host and one of a port, to be joined.
pub struct Forward<C> {
    /// The host's connection.
    pub host: C,
    /// The connection to the port.
    pub target: Target,
    /// Bytes that the host sent together with its header.
    pub early: Vec<u8>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Forward<C> {
    /// Copies both ways until both directions have ended, each by itself, or
    /// until the host has gone or the port has broken off: the other side is
    /// then closed.
    pub async fn copy(self) {
        let Self { host, mut target, early } = self;
        let _ = target.socket.set_nodelay(true);
        let (mut from_host, mut to_host) = split(host);
        let (mut from_port, mut to_port) = target.socket.split();
        let answered = CancellationToken::new();
        let up = async {
            if !upload(&mut from_host, &mut to_port, early, &answered).await? {
                // The port may have answered before it closed. The host must
                // not be stuck with bytes that nobody takes.
                tokio::select! {
                    ended = discard(&mut from_host) => ended?,
                    () = answered.cancelled() => {}
                }
            }
            Ok(())
        };
        let down = async {
            let mut buffer = vec![0; BUFFER];
            loop {
                let count = tokio::select! {
                    count = from_port.read(&mut buffer) => count?,
                    gone = gone(&mut to_host) => return Err(gone),
                };
                if count == 0 {
                    answered.cancel();
                    return to_host.shutdown().await;
                }
                to_host.write_all(buffer.get(..count).unwrap_or_default()).await?;
            }
        };
        let _ = tokio::try_join!(up, down);
    }
}

/// Copies from the host to the port, until the host's end; false if the port
/// takes no more. A port that has sent its whole answer must take something now
/// and then, because there is no other sign that the connection is still of
/// use.
///
/// # Errors
/// The host's.
async fn upload(
    from_host: &mut (impl AsyncRead + Unpin),
    to_port: &mut (impl AsyncWrite + Unpin),
    early: Vec<u8>,
    answered: &CancellationToken,
) -> io::Result<bool> {
    let mut buffer = early;
    let mut count = buffer.len();
    loop {
        let ignored = async {
            answered.cancelled().await;
            sleep(IGNORED).await;
        };
        let taken = tokio::select! {
            written = to_port.write_all(buffer.get(..count).unwrap_or_default()) => written.is_ok(),
            () = ignored => false,
        };
        if !taken {
            return Ok(false);
        }
        buffer.resize(BUFFER, 0);
        count = from_host.read(&mut buffer).await?;
        if count == 0 {
            return Ok(to_port.shutdown().await.is_ok());
        }
    }
}

/// Reads and drops bytes, until the host's end.
///
/// # Errors
/// The host's.
async fn discard(from_host: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    while from_host.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// Waits until nobody reads from `host` any more. Its end of file is no sign of
/// that: a half-closed connection still waits for the port's answer. But a
/// write fails then, even an empty one.
async fn gone(host: &mut (impl AsyncWrite + Unpin)) -> io::Error {
    loop {
        sleep(LOOK).await;
        if let Err(error) = host.write(&[]).await {
            return error;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio::net::{TcpListener, UnixStream};

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

    /// A port whose server reads and never answers, connected to a host.
    async fn silent_port(host: UnixStream) -> (TcpStream, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = connect(listener.local_addr().unwrap().port()).await.unwrap();
        let (pod, _) = listener.accept().await.unwrap();
        (pod, tokio::spawn(Forward { host, target, early: Vec::new() }.copy()))
    }

    #[tokio::test]
    async fn a_host_that_has_gone_is_noticed_though_the_port_is_silent() {
        let (mut client, host) = UnixStream::pair().unwrap();
        let (mut pod, copying) = silent_port(host).await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = Vec::new();
        pod.read_to_end(&mut heard).await.unwrap();
        // The client sends nothing more, and waits for days.
        tokio::time::pause();
        sleep(Duration::from_secs(3 * 86_400)).await;
        assert!(!copying.is_finished());
        drop(client);
        sleep(LOOK * 2).await;
        assert!(copying.is_finished());
    }

    #[tokio::test]
    async fn a_host_that_has_gone_is_noticed_though_the_port_takes_nothing() {
        let (mut client, host) = UnixStream::pair().unwrap();
        let (pod, copying) = silent_port(host).await;
        let flood = vec![0; 1 << 20];
        while timeout(Duration::from_millis(200), client.write_all(&flood)).await.is_ok() {}
        tokio::time::pause();
        drop(client);
        sleep(LOOK * 2).await;
        assert!(copying.is_finished());
        drop(pod);
    }

    #[tokio::test]
    async fn an_answer_is_heard_though_the_port_closes_during_an_upload() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = connect(listener.local_addr().unwrap().port()).await.unwrap();
        let (mut pod, _) = listener.accept().await.unwrap();
        // A part waits at the port, because the client does not read yet.
        let answer = vec![b'x'; 2 * BUFFER];
        let (client, host) = duplex(64);
        let copying = tokio::spawn(Forward { host, target, early: Vec::new() }.copy());
        let (mut from, mut to) = split(client);
        to.write_all(b"a large file").await.unwrap();
        let mut first = [0; 12];
        pod.read_exact(&mut first).await.unwrap();
        pod.write_all(&answer).await.unwrap();
        // Nothing is unread here, so the answer is delivered. Bytes that arrive
        // from now on are refused.
        drop(pod);
        for _ in 0..3 {
            to.write_all(&[0; 4096]).await.unwrap();
            sleep(Duration::from_millis(50)).await;
        }
        let mut heard = Vec::new();
        from.read_to_end(&mut heard).await.unwrap();
        assert!(heard == answer, "{} bytes", heard.len());
        timeout(Duration::from_secs(10), copying).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_port_that_takes_nothing_after_its_answer_is_given_up() {
        let (mut client, host) = UnixStream::pair().unwrap();
        let (mut pod, copying) = silent_port(host).await;
        pod.shutdown().await.unwrap();
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).await.unwrap();
        let flood = vec![0; 1 << 20];
        while timeout(Duration::from_millis(200), client.write_all(&flood)).await.is_ok() {}
        drop(client);
        tokio::time::pause();
        sleep(IGNORED / 2).await;
        assert!(!copying.is_finished());
        sleep(IGNORED).await;
        assert!(copying.is_finished());
        drop(pod);
    }

    #[tokio::test]
    async fn a_server_on_ipv6_alone_is_found() {
        // Without IPv6 in the machine there is nothing to test.
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
