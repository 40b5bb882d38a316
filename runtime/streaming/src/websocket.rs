//! Exec and attach over a WebSocket: the first byte of each message says which
//! channel it is for.
//!
//! A WebSocket's halves do not close one by one, so version 5 has a channel for
//! it: 255, with the number of the channel that its sender is done with.
//!
//! Nothing is read while nobody takes what was read last, so a ping behind it is
//! not heard; and clients leave when nobody answers for a minute. They are told
//! unasked, with pongs, that somebody is there.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::channel::{CLOSE, ERROR, RESIZE, STDERR, STDIN, STDOUT};
use super::negotiate::Protocol;
use super::peer::{CLOSE_DEADLINE, Peer, left_alone};
use super::pipe::{Command, INCOMING, Incoming, OUTGOING, Outgoing, PIECE, PendingResets};
use super::resize::Sizes;
use super::session::{Client, Run, StreamOptions};

/// The pause between two pongs to a client whose input nobody takes.
const REASSURANCE: Duration = Duration::from_secs(15);

/// Serves one client to the end.
pub async fn serve<S>(
    socket: WebSocketStream<S>,
    peer: Peer,
    options: StreamOptions,
    protocol: Protocol,
    run: Run,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sink, stream) = socket.split();
    let base64 = protocol.base64;
    let (commands, queue) = mpsc::channel(OUTGOING);
    let gone = CancellationToken::new();
    let (stdin, resize, channels) = Channels::new(options, protocol);
    let (read, written, pongs) = (gone.clone(), gone.clone(), commands.clone());
    let reader = AbortOnDropHandle::new(tokio::spawn(async move {
        channels.read(stream, &peer, &pongs).await;
        read.cancel();
    }));
    let writer = AbortOnDropHandle::new(tokio::spawn(async move {
        let result = tokio::select! {
            result = write(sink, queue, base64) => result,
            () = left_alone(&written) => Err(Error::ConnectionClosed),
        };
        if let Err(error) = result {
            tracing::debug!(%error, "streaming client");
            written.cancel();
        }
    }));
    // Channels are not reset one by one, so this stays empty.
    let pending = Arc::<PendingResets>::default();
    let channel = |number: u8| Outgoing::new(number.into(), commands.clone(), pending.clone());
    let (stdout, stderr) = (options.stdout.then(|| channel(STDOUT)), options.stderr.then(|| channel(STDERR)));
    // Some clients wait for a word before they send theirs.
    if let Some(first) = stdout.as_ref().or(stderr.as_ref()) {
        let _ = first.send(Bytes::new()).await;
    }
    let client = Client { stdin, sizes: resize.map(Sizes::new), stdout, stderr, gone: gone.clone() };
    let words = run(client).await.encode(protocol.language);
    if !words.is_empty() {
        let _ = commands.send(Command::Data(ERROR.into(), words.into())).await;
    }
    let _ = commands.send(Command::Close).await;
    let _ = writer.await;
    if !gone.is_cancelled() {
        let _ = timeout(CLOSE_DEADLINE, reader).await;
    }
}

/// Sends a pong every now and then, for ever.
async fn reassure(pongs: &mpsc::Sender<Command>, answered: &mut Instant) -> Infallible {
    loop {
        sleep_until(*answered + REASSURANCE).await;
        // One that cannot be told will find out by itself.
        let _ = pongs.send(Command::Control(Bytes::new())).await;
        *answered = Instant::now();
    }
}

/// The channels on which the client may speak.
struct Channels {
    stdin: Option<mpsc::Sender<Bytes>>,
    resize: Option<mpsc::Sender<Bytes>>,
    closes: bool,
    base64: bool,
}

impl Channels {
    fn new(options: StreamOptions, protocol: Protocol) -> (Option<Incoming>, Option<Incoming>, Self) {
        let open = |wanted: bool| wanted.then(|| mpsc::channel(INCOMING)).unzip();
        let (stdin_sender, stdin) = open(options.stdin);
        let (resize_sender, resize) = open(options.terminal && protocol.resizes);
        let Protocol { closes, base64, .. } = protocol;
        (stdin, resize, Self { stdin: stdin_sender, resize: resize_sender, closes, base64 })
    }

    /// Leads messages to their channels until the client has gone.
    async fn read<S>(
        mut self,
        mut stream: SplitStream<WebSocketStream<S>>,
        peer: &Peer,
        pongs: &mpsc::Sender<Command>,
    ) where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut answered = Instant::now();
        loop {
            let message = match stream.next().await {
                Some(Ok(Message::Binary(bytes))) => bytes,
                Some(Ok(Message::Text(text))) => text.into(),
                Some(Ok(Message::Close(_))) | None => return,
                // Pings are answered by the WebSocket itself.
                Some(Ok(_)) => {
                    answered = Instant::now();
                    continue;
                }
                Some(Err(error)) => return tracing::debug!(%error, "streaming client"),
            };
            let Some(message) = self.unpack(message) else {
                return tracing::debug!("streaming client: a message that is no base64");
            };
            let led = tokio::select! {
                biased;
                led = self.lead(message, peer) => led,
                never = reassure(pongs, &mut answered) => match never {},
            };
            if !led {
                return;
            }
        }
    }

    /// Converts a message to the form of the binary protocols. In the others the channel
    /// is a digit, and what follows is base64.
    fn unpack(&self, message: Bytes) -> Option<Bytes> {
        let Some((channel, rest)) = message.split_first().filter(|_| self.base64) else {
            return Some(message);
        };
        let mut unpacked = vec![channel.wrapping_sub(b'0')];
        STANDARD.decode_vec(rest, &mut unpacked).ok()?;
        Some(unpacked.into())
    }

    /// False if the client goes before there is room for what it said.
    async fn lead(&mut self, mut message: Bytes, peer: &Peer) -> bool {
        let Some(&channel) = message.first() else { return true };
        let mut rest = message.split_off(1);
        let queue = match channel {
            STDIN => &self.stdin,
            RESIZE => &self.resize,
            CLOSE if self.closes => {
                match rest.first() {
                    Some(&STDIN) => self.stdin = None,
                    Some(&RESIZE) => self.resize = None,
                    _ => {}
                }
                return true;
            }
            _ => return true,
        };
        let Some(queue) = queue else { return true };
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(PIECE));
            if !peer.enqueue(queue, piece).await {
                return false;
            }
        }
        true
    }
}

/// Obeys commands until the one to close.
async fn write<S>(
    mut sink: SplitSink<WebSocketStream<S>, Message>,
    mut commands: mpsc::Receiver<Command>,
    base64: bool,
) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(command) = commands.recv().await {
        match command {
            Command::Data(channel, bytes) => {
                sink.feed(pack(u8::try_from(channel).unwrap_or(ERROR), &bytes, base64)).await?;
                if commands.is_empty() {
                    sink.flush().await?;
                }
            }
            Command::Close => {
                let normal = CloseFrame { code: CloseCode::Normal, reason: "".into() };
                return sink.send(Message::Close(Some(normal))).await;
            }
            Command::Control(bytes) => sink.send(Message::Pong(bytes)).await?,
            // A channel's end is the connection's.
            Command::Finish(_) | Command::Reset(_) => {
                if commands.is_empty() {
                    sink.flush().await?;
                }
            }
        }
    }
    Ok(())
}

/// The inverse of [`Channels::unpack`].
fn pack(channel: u8, bytes: &[u8], base64: bool) -> Message {
    if base64 {
        return Message::text(format!("{channel}{}", STANDARD.encode(bytes)));
    }
    let mut message = BytesMut::with_capacity(bytes.len().saturating_add(1));
    message.put_u8(channel);
    message.put_slice(bytes);
    Message::Binary(message.freeze())
}

#[cfg(test)]
mod tests;
