//! The client's end of exec and attach: a WebSocket whose messages begin with the number of
//! their channel (Kubernetes' `v5.channel.k8s.io`).

use std::io::{IsTerminal, Write};

use anyhow::{Context, bail};
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use husk_streaming::channel::{CLOSE, ERROR, PROTOCOL, RESIZE, STDERR, STDIN, STDOUT};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;

mod keys;
mod status;
mod terminal;

use keys::Keys;
pub use status::code_of;
use terminal::Raw;

/// The most input that one message has, bytes.
const PIECE: usize = 16 * 1024;

type Socket = WebSocketStream<TcpStream>;

/// How a stream ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The other side said how: Kubernetes' `Status` as JSON, empty for a plain end.
    Told(String),
    /// The connection broke.
    Lost,
    /// The user typed the keys that detach.
    Detached,
}

/// An open stream, through which nothing has gone yet.
pub struct Stream {
    socket: Socket,
    /// The process has a terminal.
    tty: bool,
    /// This process's input goes there.
    stdin: bool,
}

impl Stream {
    /// Opens the stream that huskd offers at `url`.
    ///
    /// # Errors
    /// huskd does not answer there.
    pub async fn open(url: &str, tty: bool, stdin: bool) -> anyhow::Result<Self> {
        let address = url.strip_prefix("http://").and_then(|rest| rest.split('/').next());
        let Some(address) = address else { bail!("open a stream: {url} is no address of huskd's") };
        let mut request =
            url.replacen("http://", "ws://", 1).into_client_request().context("open a stream")?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
        let connection =
            TcpStream::connect(address).await.with_context(|| format!("open a stream at {address}"))?;
        let _ = connection.set_nodelay(true);
        let (socket, _) = tokio_tungstenite::client_async(request, connection)
            .await
            .with_context(|| format!("open a stream at {address}"))?;
        Ok(Self { socket, tty, stdin })
    }

    /// Passes on input and output until the stream ends. With a terminal on both sides, this
    /// one's keys go through as they are.
    ///
    /// # Errors
    /// The output cannot be written.
    pub async fn run(self) -> anyhow::Result<End> {
        let raw = match self.tty && self.stdin && std::io::stdin().is_terminal() {
            true => Some(Raw::new().context("set the terminal")?),
            false => None,
        };
        let (sink, stream) = self.socket.split();
        let typed = talk(sink, self.stdin, self.tty, raw.is_some());
        let end = tokio::select! {
            end = listen(stream) => end,
            () = typed => Ok(End::Detached),
        };
        drop(raw);
        end
    }
}

/// Writes what comes to this process's outputs.
async fn listen(mut stream: SplitStream<Socket>) -> anyhow::Result<End> {
    let mut told = String::new();
    loop {
        let message = match stream.next().await {
            Some(Ok(Message::Binary(bytes))) => bytes,
            Some(Ok(Message::Close(_))) => return Ok(End::Told(told)),
            Some(Ok(_)) => continue,
            Some(Err(_)) | None if told.is_empty() => return Ok(End::Lost),
            Some(Err(_)) | None => return Ok(End::Told(told)),
        };
        let Some((channel, bytes)) = message.split_first() else { continue };
        match *channel {
            STDOUT => write(&mut std::io::stdout().lock(), bytes)?,
            STDERR => write(&mut std::io::stderr().lock(), bytes)?,
            ERROR => told.push_str(&String::from_utf8_lossy(bytes)),
            _ => {}
        }
    }
}

fn write(to: &mut impl Write, bytes: &[u8]) -> anyhow::Result<()> {
    to.write_all(bytes).and_then(|()| to.flush()).context("write the output")
}

/// Sends this process's input and its terminal's sizes. Returns when the user detaches, and
/// never for another reason: the stream's end is the other side's.
async fn talk(mut sink: SplitSink<Socket, Message>, stdin: bool, tty: bool, raw: bool) {
    let mut resized = signal(SignalKind::window_change()).ok();
    let mut input = tokio::io::stdin();
    let mut buffer = vec![0; PIECE];
    let mut open = stdin;
    let mut keys = Keys::default();
    if tty {
        send_size(&mut sink).await;
    }
    loop {
        let resize = async {
            match &mut resized {
                Some(resized) if tty => resized.recv().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            read = input.read(&mut buffer), if open => {
                let length = read.unwrap_or(0);
                let bytes = buffer.get(..length).unwrap_or_default();
                if bytes.is_empty() {
                    open = false;
                    send(&mut sink, CLOSE, &[STDIN]).await;
                } else if raw && keys.detach(bytes) {
                    let _ = sink.close().await;
                    return;
                } else {
                    send(&mut sink, STDIN, bytes).await;
                }
            }
            _ = resize => send_size(&mut sink).await,
        }
    }
}

/// Sends a message; a connection that is gone is the listener's to notice.
async fn send(sink: &mut SplitSink<Socket, Message>, channel: u8, bytes: &[u8]) {
    let mut message = BytesMut::with_capacity(1 + bytes.len());
    message.put_u8(channel);
    message.put_slice(bytes);
    let _ = sink.send(Message::Binary(Bytes::from(message))).await;
}

async fn send_size(sink: &mut SplitSink<Socket, Message>) {
    if let Some((width, height)) = terminal::size() {
        let size = serde_json::json!({ "Width": width, "Height": height }).to_string();
        send(sink, RESIZE, size.as_bytes()).await;
    }
}
