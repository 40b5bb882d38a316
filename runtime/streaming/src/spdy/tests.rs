//! The framer on any bytes, and whole sessions with a client of the tests' own.

#![allow(clippy::indexing_slicing)]

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::connection::MAX_STREAMS;
pub use super::frame::Control;
use super::frame::{Error, HEAD, Head, MAX_CONTROL};
use super::header::{Block, Deflater, Inflater};
use super::*;
use crate::peer::Peer;
use crate::pipe::{INCOMING, PIECE};

const SOON: Duration = Duration::from_secs(10);

/// A client that does what Go's does.
pub struct TestClient<S> {
    io: S,
    inflater: Inflater,
    deflater: Deflater,
    next: u32,
    /// Heard while it waited for something else.
    early: VecDeque<Heard>,
}

/// The frames that a client receives.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    Data(u32, Vec<u8>, bool),
    Control(Control),
}

impl<S: AsyncRead + AsyncWrite + Unpin> TestClient<S> {
    pub fn new(io: S) -> Self {
        Self {
            io,
            inflater: Inflater::default(),
            deflater: Deflater::default(),
            next: 1,
            early: VecDeque::new(),
        }
    }

    /// Opens a stream and waits for the answer.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let stream = self.syn(headers).await;
        loop {
            match self.hear_new().await.unwrap() {
                Heard::Control(Control::SynReply { stream: answered, .. }) if answered == stream => {
                    return stream;
                }
                other => self.early.push_back(other),
            }
        }
    }

    async fn syn(&mut self, headers: &[(&str, &str)]) -> u32 {
        let stream = self.next;
        self.next += 2;
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        self.control(Control::SynStream { stream, fin: false, headers: Block(headers.collect()) }).await;
        stream
    }

    pub async fn control(&mut self, control: Control) {
        let mut frame = BytesMut::new();
        control.write(&mut self.deflater, &mut frame).unwrap();
        self.io.write_all(&frame).await.unwrap();
        self.io.flush().await.unwrap();
    }

    pub async fn data(&mut self, stream: u32, bytes: &[u8], fin: bool) {
        let mut frame = BytesMut::new();
        Head::Data { stream, fin, length: u32::try_from(bytes.len()).unwrap() }.write(&mut frame);
        frame.extend_from_slice(bytes);
        self.io.write_all(&frame).await.unwrap();
        self.io.flush().await.unwrap();
    }

    /// The next frame; window updates, which Go's client does not know, are
    /// passed over. `None` when the server has closed.
    pub async fn hear(&mut self) -> Option<Heard> {
        match self.early.pop_front() {
            Some(heard) => Some(heard),
            None => self.hear_new().await,
        }
    }

    async fn hear_new(&mut self) -> Option<Heard> {
        loop {
            match self.hear_any().await? {
                Heard::Control(Control::WindowUpdate { .. }) => {}
                other => return Some(other),
            }
        }
    }

    /// The same with window updates.
    async fn hear_any(&mut self) -> Option<Heard> {
        let mut head = [0; HEAD];
        timeout(SOON, self.io.read_exact(&mut head)).await.unwrap().ok()?;
        match Head::parse(head).unwrap() {
            Head::Data { stream, fin, length } => {
                let mut bytes = vec![0; length as usize];
                self.io.read_exact(&mut bytes).await.unwrap();
                Some(Heard::Data(stream, bytes, fin))
            }
            Head::Control { kind, flags, length } => {
                let mut payload = vec![0; length as usize];
                self.io.read_exact(&mut payload).await.unwrap();
                Some(Heard::Control(reply(kind, flags, &payload, &mut self.inflater)))
            }
        }
    }

    /// Everything until the server says GOAWAY: by stream, the bytes, and
    /// whether they came to their end.
    pub async fn hear_all(&mut self) -> HashMap<u32, (Vec<u8>, bool)> {
        let mut all = HashMap::<u32, (Vec<u8>, bool)>::new();
        while let Some(heard) = self.hear().await {
            match heard {
                Heard::Data(stream, bytes, fin) => {
                    let stream = all.entry(stream).or_default();
                    assert!(!stream.1, "data after the end");
                    stream.0.extend_from_slice(&bytes);
                    stream.1 = fin;
                }
                Heard::Control(Control::GoAway { .. }) => break,
                Heard::Control(_) => {}
            }
        }
        all
    }
}

fn reply(kind: u16, flags: u8, payload: &[u8], inflater: &mut Inflater) -> Control {
    Control::parse(kind, flags, payload, inflater).unwrap()
}

fn session() -> (TestClient<DuplexStream>, Connection) {
    let (client, server) = duplex(1024);
    (TestClient::new(client), Connection::start(server, Peer::none()))
}

fn block(headers: &[(&str, &str)]) -> Block {
    Block(headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
}

#[test]
fn what_gos_client_writes_is_understood() {
    // Two SYN_STREAMs, DATA and PING as `spdystream` 0.5.1 puts them.
    let hex = "800300010000003d0000000100000000000078f9e3c6a7c202253a703a2b294a4dcc851625aca9a0808614cb45a0\
               24cc6461c0c0c0c0590489c44c50e2663400000000ffff800300010000001b00000003000000000000c2aeb5b824\
               25338f80564300000000ffff000000030000000568656c6c6f800300060000000400000001";
    let hex: String = hex.split_whitespace().collect();
    let mut bytes: Vec<u8> =
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    let mut inflater = Inflater::default();
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let head = Head::parse(bytes[..HEAD].try_into().unwrap()).unwrap();
        let (Head::Data { length, .. } | Head::Control { length, .. }) = head;
        let rest = bytes.split_off(HEAD + length as usize);
        if let Head::Control { kind, flags, .. } = head {
            frames.push(Control::parse(kind, flags, &bytes[HEAD..], &mut inflater).unwrap());
        } else {
            assert_eq!(
                (head, &bytes[HEAD..]),
                (Head::Data { stream: 3, fin: false, length: 5 }, &b"hello"[..])
            );
        }
        bytes = rest;
    }
    let [first, second, ping] = frames.as_slice() else { panic!("{frames:?}") };
    for (frame, number, kind, id) in [(first, 1, "error", "0"), (second, 3, "stdin", "1")] {
        let Control::SynStream { stream, fin: false, headers } = frame else { panic!("{frame:?}") };
        assert_eq!(*stream, number);
        let values = ["streamtype", "port", "requestid"].map(|name| headers.get(name).unwrap());
        assert_eq!(values, [kind, "80", id]);
    }
    assert_eq!(*ping, Control::Ping { id: 1 });
}

#[test]
fn a_few_bytes_cannot_become_many() {
    let bomb = block(&[("x", &"a".repeat(4 << 20))]);
    let packed = Deflater::default().pack(&bomb).unwrap();
    assert!(packed.len() < MAX_CONTROL as usize, "{}", packed.len());
    assert_eq!(Inflater::default().unpack(&packed), Err(Error::Headers("too long")));
}

#[test]
fn long_control_frames_and_other_versions_are_refused() {
    assert_eq!(Head::parse([0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]), Err(Error::TooLong(0x00ff_ffff)));
    assert_eq!(Head::parse([0x80, 2, 0, 1, 0, 0, 0, 0]), Err(Error::Version(2)));
    assert!(Control::parse(1, 0, &[0; 5], &mut Inflater::default()).is_err());
    assert_eq!(Control::parse(6, 0, &[0; 5], &mut Inflater::default()), Err(Error::Length(6)));
}

fn headers() -> impl Strategy<Value = Block> {
    prop::collection::vec(("[a-z-]{1,20}", ".{0,40}"), 0..6).prop_map(Block)
}

fn controls() -> impl Strategy<Value = Control> {
    let stream = 0..0x3fff_ffffu32;
    let number = 0..=0x7fff_ffffu32;
    prop_oneof![
        (stream.clone(), any::<bool>(), headers()).prop_map(|(stream, fin, headers)| Control::SynStream {
            stream: stream * 2 + 1,
            fin,
            headers
        }),
        (number.clone(), any::<bool>(), headers()).prop_map(|(stream, fin, headers)| Control::SynReply {
            stream,
            fin,
            headers
        }),
        (number.clone(), any::<bool>(), headers()).prop_map(|(stream, fin, headers)| Control::Headers {
            stream,
            fin,
            headers
        }),
        (number.clone(), any::<u32>()).prop_map(|(stream, status)| Control::RstStream { stream, status }),
        any::<u32>().prop_map(|id| Control::Ping { id }),
        (number.clone(), any::<u32>()).prop_map(|(last, status)| Control::GoAway { last, status }),
        (number.clone(), number).prop_map(|(stream, delta)| Control::WindowUpdate { stream, delta }),
        (10..1000u16).prop_map(|kind| Control::Other { kind }),
    ]
}

proptest! {
    #[test]
    fn frames_read_back_as_written(controls in prop::collection::vec(controls(), 1..8)) {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        for control in controls {
            let mut frame = BytesMut::new();
            control.write(&mut deflater, &mut frame).unwrap();
            let Head::Control { kind, flags, length } = Head::parse(frame[..HEAD].try_into().unwrap()).unwrap()
            else { panic!("a data frame") };
            prop_assert_eq!(length as usize, frame.len() - HEAD);
            prop_assert_eq!(Control::parse(kind, flags, &frame[HEAD..], &mut inflater).unwrap(), control);
        }
    }

    #[test]
    fn any_frame_is_survived(head: [u8; HEAD], payload in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(Head::Control { kind, flags, .. }) = Head::parse(head) {
            let _ = Control::parse(kind, flags, &payload, &mut Inflater::default());
        }
        for kind in 0..12 {
            let _ = Control::parse(kind, head[0], &payload, &mut Inflater::default());
        }
    }

    /// Headers that begin well, as those of an attacker would.
    #[test]
    fn damaged_headers_are_survived(at in 0usize..60, with: u8) {
        let mut packed = Deflater::default().pack(&block(&[("streamtype", "stdin"), ("port", "80")])).unwrap();
        let at = at % packed.len();
        packed[at] = with;
        let _ = Inflater::default().unpack(&packed);
    }

    /// A session ends on nonsense, or when it does; it does not hang.
    #[test]
    fn a_session_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..2000), sane in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut client, mut session) = session();
            if sane {
                client.syn(&[("streamtype", "stdin")]).await;
            }
            let (mut reader, mut writer) = tokio::io::split(client.io);
            let writing = async move {
                // The session may have ended in the middle of it.
                let _ = writer.write_all(&bytes).await;
                let _ = writer.shutdown().await;
            };
            let hearing = async { while !matches!(reader.read(&mut [0; 100]).await, Ok(0) | Err(_)) {} };
            let serving = async {
                while session.accept().await.is_some() {}
                session.close().await;
            };
            timeout(SOON, async { tokio::join!(writing, hearing, serving) }).await.unwrap();
        });
    }
}

#[tokio::test]
async fn each_half_of_a_stream_ends_alone() {
    let (mut client, mut session) = session();
    let number = client.open(&[("streamtype", "stdin")]).await;
    let mut stream = session.accept().await.unwrap();
    assert_eq!((stream.id, stream.headers.get("StreamType")), (number, Some("stdin")));
    client.data(number, b"question", true).await;
    assert_eq!(stream.incoming.recv().await.unwrap(), "question");
    assert_eq!(stream.incoming.recv().await, None);
    stream.outgoing.send(Bytes::from_static(b"answer")).await.unwrap();
    stream.outgoing.finish().await.unwrap();
    let closing = tokio::spawn(session.close());
    assert_eq!(client.hear_all().await[&number], (b"answer".to_vec(), true));
    drop(client);
    timeout(SOON, closing).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_session_survives_days_of_silence() {
    let (mut client, mut session) = session();
    let number = client.open(&[("streamtype", "stdin")]).await;
    let mut stream = session.accept().await.unwrap();
    tokio::time::sleep(Duration::from_secs(3 * 86_400)).await;
    client.data(number, b"still there?", false).await;
    assert_eq!(stream.incoming.recv().await.unwrap(), "still there?");
    stream.outgoing.send(Bytes::from_static(b"yes")).await.unwrap();
    assert_eq!(client.hear().await.unwrap(), Heard::Data(number, b"yes".to_vec(), false));
}

/// As [`session`], with the kernel's buffers between the two.
async fn session_over_tcp() -> (TestClient<TcpStream>, Connection) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TestClient::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
    let (socket, _) = listener.accept().await.unwrap();
    let peer = Peer::of(&socket);
    (client, Connection::start(socket, peer))
}

#[tokio::test]
async fn closing_waits_for_the_client_to_hear_everything() {
    let (mut client, mut session) = session_over_tcp().await;
    let number = client.open(&[("streamtype", "stdout")]).await;
    let stream = session.accept().await.unwrap();
    // Bytes that nobody reads: a careless close would answer them with a reset.
    client.data(number, &[1; 1000], false).await;
    let serving = tokio::spawn(async move {
        for _ in 0..32 {
            stream.outgoing.send(vec![7; PIECE].into()).await.unwrap();
        }
        stream.outgoing.finish().await.unwrap();
        session.close().await;
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.data(number, &[1; 1000], false).await;
    let (bytes, ended) = client.hear_all().await.remove(&number).unwrap();
    assert_eq!((bytes.len(), ended), (32 * PIECE, true));
    drop(client);
    timeout(SOON, serving).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_waits_for_a_client_that_pauses_for_an_hour() {
    let (mut client, mut session) = session();
    let number = client.open(&[("streamtype", "stdout")]).await;
    let stream = session.accept().await.unwrap();
    let serving = tokio::spawn(async move {
        for _ in 0..32 {
            stream.outgoing.send(vec![7; PIECE].into()).await.unwrap();
        }
        stream.outgoing.finish().await.unwrap();
        session.close().await;
    });
    // First with more to come than the session holds, then with its end alone.
    let mut heard = 0;
    while heard < 31 * PIECE {
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let Some(Heard::Data(_, bytes, false)) = client.hear().await else { panic!("cut after {heard}") };
        heard += bytes.len();
    }
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(client.hear_all().await[&number], (vec![7; PIECE], true));
    drop(client);
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_has_gone_is_not_waited_for() {
    let (mut client, mut session) = session();
    client.open(&[("streamtype", "stdout")]).await;
    let stream = session.accept().await.unwrap();
    // The client sends no more and reads nothing, but does not close either.
    let (mut reader, mut writer) = tokio::io::split(client.io);
    writer.shutdown().await.unwrap();
    assert!(session.accept().await.is_none());
    let before = tokio::time::Instant::now();
    for _ in 0..3 {
        stream.outgoing.send(vec![7; PIECE].into()).await.unwrap();
    }
    session.close().await;
    assert!(before.elapsed() < Duration::from_secs(60));
    while reader.read(&mut [0; 100]).await.unwrap() > 0 {}
}

#[tokio::test]
async fn a_full_queue_holds_up_no_reset_and_no_window() {
    let (mut client, mut session) = session();
    let number = client.open(&[("streamtype", "stdout")]).await;
    let Stream { mut incoming, outgoing, .. } = session.accept().await.unwrap();
    let refused = client.open(&[("streamtype", "data")]).await;
    let stream = session.accept().await.unwrap();
    let mut sent = 0;
    while timeout(Duration::from_millis(100), outgoing.send(vec![0; PIECE].into())).await.is_ok() {
        sent += 1;
    }
    drop(stream);
    let taking = tokio::spawn(async move { while incoming.recv().await.is_some() {} });
    client.data(number, &[0; PIECE], true).await;
    taking.await.unwrap();
    let (mut reset, mut given, mut heard) = (false, HashMap::new(), 0);
    while heard < sent * PIECE {
        match client.hear_any().await.unwrap() {
            Heard::Data(_, bytes, _) => heard += bytes.len(),
            Heard::Control(Control::RstStream { stream, .. }) => reset |= stream == refused,
            Heard::Control(Control::WindowUpdate { stream, delta }) => {
                given.insert(stream, delta);
            }
            Heard::Control(other) => panic!("{other:?}"),
        }
    }
    assert!(reset, "the client would wait for ever for the end of a stream that nobody serves");
    assert_eq!(given, HashMap::from([(0, PIECE as u32), (number, PIECE as u32)]));
}

#[tokio::test]
async fn a_client_that_reads_nothing_holds_the_verb_up() {
    let (mut client, mut session) = session();
    let number = client.open(&[("streamtype", "stdout")]).await;
    let stream = session.accept().await.unwrap();
    let mut sent = 0;
    while timeout(Duration::from_millis(100), stream.outgoing.send(vec![0; PIECE].into())).await.is_ok() {
        sent += 1;
        assert!(sent < 100, "nothing holds it up");
    }
    let reading = tokio::spawn(async move { client.hear_all().await.remove(&number).unwrap().0.len() });
    stream.outgoing.finish().await.unwrap();
    let closing = tokio::spawn(session.close());
    assert_eq!(reading.await.unwrap(), sent * PIECE);
    closing.await.unwrap();
}

#[tokio::test]
async fn a_verb_that_takes_nothing_holds_the_client_up() {
    let (mut client, mut session) = session_over_tcp().await;
    let number = client.open(&[("streamtype", "stdin")]).await;
    let stream = session.accept().await.unwrap();
    let mut sent = 0;
    while timeout(Duration::from_millis(500), client.data(number, &[0; PIECE], false)).await.is_ok() {
        sent += 1;
        assert!(sent < 2000, "nothing holds it up");
    }
    assert_eq!(stream.incoming.len(), INCOMING);
    drop(client);
}

#[tokio::test]
async fn a_client_that_goes_while_nobody_takes_what_it_said_is_noticed() {
    let (mut client, mut session) = session_over_tcp().await;
    let number = client.open(&[("streamtype", "stdin")]).await;
    let _stream = session.accept().await.unwrap();
    for _ in 0..=INCOMING {
        client.data(number, &[0; 10], false).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!session.gone().is_cancelled());
    drop(client);
    timeout(SOON, session.gone().cancelled()).await.unwrap();
}

#[tokio::test]
async fn a_frame_larger_than_any_buffer_passes_in_pieces() {
    let (mut client, mut session) = session();
    let number = client.open(&[("streamtype", "stdin")]).await;
    let mut stream = session.accept().await.unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|n: u32| n.to_le_bytes()[1]).collect();
    let expected = bytes.clone();
    let (mut reader, mut writer) = tokio::io::split(client.io);
    let writing = tokio::spawn(async move {
        let mut frame = BytesMut::new();
        Head::Data { stream: number, fin: true, length: u32::try_from(bytes.len()).unwrap() }
            .write(&mut frame);
        writer.write_all(&frame).await.unwrap();
        writer.write_all(&bytes).await.unwrap();
    });
    let updates = tokio::spawn(async move { while reader.read(&mut [0; 100]).await.unwrap() > 0 {} });
    let mut got = Vec::new();
    while let Some(piece) = stream.incoming.recv().await {
        assert!(piece.len() <= PIECE);
        got.extend_from_slice(&piece);
    }
    assert_eq!(got, expected);
    writing.await.unwrap();
    drop((stream, session));
    updates.await.unwrap();
}

#[tokio::test]
async fn pings_are_answered_and_window_is_given_back() {
    let (mut client, mut session) = session();
    client.control(Control::Ping { id: 5 }).await;
    assert_eq!(client.hear().await, Some(Heard::Control(Control::Ping { id: 5 })));
    let number = client.open(&[("streamtype", "stdin")]).await;
    let mut stream = session.accept().await.unwrap();
    let taking = tokio::spawn(async move { while stream.incoming.recv().await.is_some() {} });
    client.data(number, &[0; PIECE], false).await;
    let mut given = HashMap::new();
    while given.len() < 2 {
        let mut head = [0; HEAD];
        client.io.read_exact(&mut head).await.unwrap();
        let mut payload = [0; 8];
        client.io.read_exact(&mut payload).await.unwrap();
        let Head::Control { kind, flags, .. } = Head::parse(head).unwrap() else { panic!("{head:?}") };
        let Control::WindowUpdate { stream, delta } = reply(kind, flags, &payload, &mut client.inflater)
        else {
            panic!("{kind}")
        };
        *given.entry(stream).or_insert(0) += delta;
    }
    assert_eq!(given, HashMap::from([(0, PIECE as u32), (number, PIECE as u32)]));
    client.data(number, &[], true).await;
    timeout(SOON, taking).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_reset_reaches_the_verb_and_frees_the_streams_place() {
    let (mut client, mut session) = session();
    let accepting = tokio::spawn(async move {
        let mut streams = Vec::new();
        for _ in 0..MAX_STREAMS {
            streams.push(session.accept().await.unwrap());
        }
        (streams, session)
    });
    let mut last = 0;
    for _ in 0..MAX_STREAMS {
        last = client.open(&[]).await;
    }
    let (mut streams, mut session) = accepting.await.unwrap();
    let refused = client.syn(&[]).await;
    let status = Control::REFUSED_STREAM;
    assert_eq!(client.hear().await, Some(Heard::Control(Control::RstStream { stream: refused, status })));
    client.control(Control::RstStream { stream: last, status: Control::CANCEL }).await;
    let stream = streams.pop().unwrap();
    timeout(SOON, stream.reset.cancelled()).await.unwrap();
    client.open(&[]).await;
    assert!(session.accept().await.is_some());
    // An unfinished stream that is dropped is reset.
    let dropped = streams.pop().unwrap();
    let (number, status) = (dropped.id, Control::CANCEL);
    drop((stream, dropped));
    loop {
        if client.hear().await == Some(Heard::Control(Control::RstStream { stream: number, status })) {
            break;
        }
    }
}

#[tokio::test]
async fn a_stream_cannot_be_opened_twice() {
    let (mut client, mut session) = session();
    client.open(&[]).await;
    session.accept().await.unwrap();
    client.next = 1;
    client.syn(&[]).await;
    timeout(SOON, session.gone().cancelled()).await.unwrap();
}
