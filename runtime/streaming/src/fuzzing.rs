//! Entrances for `tests/fuzz`: sessions over any bytes, without the HTTP request before them.

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};

use super::negotiate::{SPDY_PROTOCOLS, WEBSOCKET_PROTOCOLS};
use super::peer::Peer;
use super::session::{Connect, Run, StreamOptions};
use super::spdy::Connection;
use super::spdy::frame::{Control, HEAD, Head};
use super::spdy::header::{Block, Deflater, Inflater};
use super::{ports, remote_command, tunnel, websocket};

/// Serves exec or attach over SPDY, in one of the protocols.
pub async fn command_over_spdy<S>(io: S, options: StreamOptions, protocol: usize, run: Run)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let Some(protocol) = SPDY_PROTOCOLS.get(protocol % SPDY_PROTOCOLS.len()) else { return };
    remote_command::serve(Connection::start(io, Peer::none()), options, *protocol, run).await;
}

/// Serves exec or attach over a WebSocket, in one of the protocols.
pub async fn command_over_websocket<S>(io: S, options: StreamOptions, protocol: usize, run: Run)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Some(protocol) = WEBSOCKET_PROTOCOLS.get(protocol % WEBSOCKET_PROTOCOLS.len()) else { return };
    websocket::serve(tunnel::socket(io).await, Peer::none(), options, *protocol, run).await;
}

/// Serves a port-forward over SPDY.
pub async fn ports_over_spdy<S>(io: S, connect: Connect)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    ports::serve(Connection::start(io, Peer::none()), connect).await;
}

/// Serves a port-forward over SPDY in a WebSocket.
pub async fn ports_over_websocket<S>(io: S, connect: Connect)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let tunnel = tunnel::Tunnel::new(tunnel::socket(io).await);
    ports::serve(Connection::start(tunnel, Peer::none()), connect).await;
}

/// Reads bytes as frames, up to the first that is none. Every control frame that is read can be written, and is then
/// read as the same.
///
/// # Panics
/// A frame is not the same after it was written and read.
#[allow(clippy::expect_used)]
pub fn frames(mut bytes: &[u8]) {
    let (mut inflater, mut deflater, mut second) =
        (Inflater::default(), Deflater::default(), Inflater::default());
    while let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() {
        let Ok(head) = Head::parse(*head) else { return };
        let mut written = BytesMut::new();
        head.write(&mut written);
        assert_eq!(written.first_chunk().map(|bytes| Head::parse(*bytes)), Some(Ok(head)));
        let (Head::Data { length, .. } | Head::Control { length, .. }) = head;
        let Some((payload, rest)) = rest.split_at_checked(length as usize) else { return };
        bytes = rest;
        let Head::Control { kind, flags, .. } = head else { continue };
        let Ok(control) = Control::parse(kind, flags, payload, &mut inflater) else { return };
        let mut written = BytesMut::new();
        // Headers that nobody would pack so well may not fit when they are packed again.
        if control.write(&mut deflater, &mut written).is_err() {
            return;
        }
        let (head, payload) = written.split_first_chunk::<HEAD>().expect("a frame has a head");
        let Ok(Head::Control { kind, flags, .. }) = Head::parse(*head) else { panic!("{head:?}") };
        assert_eq!(Control::parse(kind, flags, payload, &mut second), Ok(control));
    }
}

/// A client's frames, for seeds and for inputs that say which frames to send.
#[derive(Debug, Default)]
pub struct Frames {
    deflater: Deflater,
    bytes: BytesMut,
}

impl Frames {
    /// Opens a stream.
    pub fn open(&mut self, stream: u32, fin: bool, headers: &[(&str, &str)]) {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        self.control(&Control::SynStream { stream, fin, headers: Block(headers.collect()) });
    }

    /// Sends bytes on a stream.
    pub fn data(&mut self, stream: u32, fin: bool, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).unwrap_or_default();
        Head::Data { stream, fin, length }.write(&mut self.bytes);
        self.bytes.extend_from_slice(bytes);
    }

    /// Resets a stream.
    pub fn reset(&mut self, stream: u32) {
        self.control(&Control::RstStream { stream, status: Control::CANCEL });
    }

    /// Asks whether somebody is there.
    pub fn ping(&mut self, id: u32) {
        self.control(&Control::Ping { id });
    }

    /// Says that no stream will follow.
    pub fn go_away(&mut self) {
        self.control(&Control::GoAway { last: 0, status: 0 });
    }

    /// Any bytes.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn control(&mut self, control: &Control) {
        // Frames that are too long are not sent.
        let _ = control.write(&mut self.deflater, &mut self.bytes);
    }

    /// The bytes on the wire.
    #[must_use]
    pub fn done(self) -> Vec<u8> {
        self.bytes.to_vec()
    }
}
