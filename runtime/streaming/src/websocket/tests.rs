//! Channels of a WebSocket, with a client that speaks as Go's does.

#![allow(clippy::indexing_slicing)]

use std::time::Duration;

use futures::FutureExt;
use proptest::prelude::*;
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use tokio_tungstenite::tungstenite::protocol::Role;

use super::super::negotiate::{Protocol, WEBSOCKET_PROTOCOLS};
use super::super::status::ExitStatus;
use super::super::tunnel;
use super::*;

const SOON: Duration = Duration::from_secs(10);
const V5: Protocol = WEBSOCKET_PROTOCOLS[0];
const V4: Protocol = WEBSOCKET_PROTOCOLS[1];
const ALL: StreamOptions = StreamOptions { stdin: true, stdout: true, stderr: true, terminal: false };

/// Repeats its input on both outputs and ends with the number of its bytes.
async fn repeat(mut client: Client) -> ExitStatus {
    let mut count = 0;
    while let Some(bytes) = client.stdin.as_mut().unwrap().recv().await {
        count += i32::try_from(bytes.len()).unwrap();
        for output in [&client.stdout, &client.stderr] {
            output.as_ref().unwrap().send(bytes.clone()).await.unwrap();
        }
    }
    ExitStatus::Exit(count)
}

async fn start<F>(protocol: Protocol, run: impl FnOnce(Client) -> F) -> WebSocketStream<DuplexStream>
where
    F: Future<Output = ExitStatus> + Send + 'static,
    F: 'static,
{
    let (ours, theirs) = duplex(1024);
    let (sender, client) = tokio::sync::oneshot::channel();
    let server = tunnel::socket(theirs).await;
    let given: Run = Box::new(move |client| {
        let (answer, ending) =
            tokio::sync::oneshot::channel::<futures::future::BoxFuture<'static, ExitStatus>>();
        let _ = sender.send((client, answer));
        async move { ending.await.unwrap().await }.boxed()
    });
    tokio::spawn(serve(server, Peer::none(), ALL, protocol, given));
    let mut socket = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
    // The word that comes first.
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::binary(vec![STDOUT]));
    let (client, answer) = client.await.unwrap();
    assert!(answer.send(run(client).boxed()).is_ok());
    socket
}

/// The messages of each channel until the server closes.
async fn hear_all(socket: &mut WebSocketStream<DuplexStream>) -> [Vec<u8>; 4] {
    let mut channels: [Vec<u8>; 4] = Default::default();
    loop {
        match timeout(SOON, socket.next()).await.unwrap().unwrap().unwrap() {
            Message::Binary(bytes) => channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]),
            Message::Close(close) => {
                assert_eq!(close.unwrap().code, CloseCode::Normal);
                return channels;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn version_5_ends_input_with_a_word() {
    let mut socket = start(V5, repeat).await;
    socket.send(Message::binary(&b"\x00one "[..])).await.unwrap();
    socket.send(Message::text("\0two")).await.unwrap();
    socket.send(Message::binary(vec![CLOSE, STDIN])).await.unwrap();
    // Too late.
    socket.send(Message::binary(&b"\x00three"[..])).await.unwrap();
    let [_, out, err, error] = hear_all(&mut socket).await;
    assert_eq!((out.as_slice(), err.as_slice()), (&b"one two"[..], &b"one two"[..]));
    let status: serde_json::Value = serde_json::from_slice(&error).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "7");
}

#[tokio::test]
async fn version_4_does_not_know_the_word() {
    let mut socket = start(V4, async |mut client: Client| {
        let stdin = client.stdin.as_mut().unwrap();
        assert_eq!(stdin.recv().await.unwrap(), "still open");
        ExitStatus::Success
    })
    .await;
    socket.send(Message::binary(vec![CLOSE, STDIN])).await.unwrap();
    socket.send(Message::binary(&b"\0still open"[..])).await.unwrap();
    assert!(String::from_utf8_lossy(&hear_all(&mut socket).await[3]).contains("Success"));
}

/// A command that waits until its client has gone, and says so.
async fn start_until_gone() -> (WebSocketStream<DuplexStream>, tokio::sync::oneshot::Receiver<()>) {
    let (sender, noticed) = tokio::sync::oneshot::channel();
    let socket = start(V5, async |client: Client| {
        client.gone.cancelled().await;
        let _ = sender.send(());
        ExitStatus::Failed("gone".into())
    })
    .await;
    (socket, noticed)
}

#[tokio::test]
async fn a_client_that_breaks_off_is_noticed() {
    let (socket, noticed) = start_until_gone().await;
    drop(socket);
    timeout(SOON, noticed).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_message_beyond_all_measure_ends_the_connection() {
    let (socket, noticed) = start_until_gone().await;
    // The head of a masked binary frame of 2^40 bytes.
    let mut raw = socket.into_inner();
    raw.write_all(&[0x82, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4]).await.unwrap();
    timeout(SOON, noticed).await.unwrap().unwrap();
}

#[tokio::test]
async fn pings_are_answered_while_the_command_is_silent() {
    let mut socket = start(V5, repeat).await;
    socket.send(Message::Ping(Bytes::from_static(b"there?"))).await.unwrap();
    let pong = timeout(SOON, socket.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(pong, Message::Pong(Bytes::from_static(b"there?")));
}

#[tokio::test(start_paused = true)]
async fn a_command_survives_days_of_silence() {
    let mut socket = start(V5, repeat).await;
    tokio::time::sleep(Duration::from_secs(3 * 86_400)).await;
    socket.send(Message::binary(&b"\x00still there?"[..])).await.unwrap();
    socket.send(Message::binary(vec![CLOSE, STDIN])).await.unwrap();
    let [_, out, ..] = hear_all(&mut socket).await;
    assert_eq!(out, b"still there?");
}

#[tokio::test(start_paused = true)]
async fn closing_waits_for_a_client_that_pauses_for_half_an_hour() {
    let mut socket = start(V5, async |client: Client| {
        for _ in 0..5 {
            client.stdout.as_ref().unwrap().send(vec![7; PIECE].into()).await.unwrap();
        }
        ExitStatus::Exit(3)
    })
    .await;
    // First with more to come than the connection holds, then with its end alone.
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(1800)).await;
        assert_eq!(socket.next().await.unwrap().unwrap().len(), PIECE + 1);
    }
    tokio::time::sleep(Duration::from_secs(1800)).await;
    let [_, out, _, error] = hear_all(&mut socket).await;
    assert_eq!(out, b"");
    assert!(String::from_utf8_lossy(&error).contains("NonZeroExitCode"));
}

#[tokio::test(start_paused = true)]
async fn a_client_whose_input_nobody_takes_is_told_that_somebody_is_there() {
    let socket = start(V5, async |client: Client| {
        client.gone.cancelled().await;
        drop(client.stdin);
        ExitStatus::Success
    })
    .await;
    let (mut sink, mut stream) = socket.split();
    let typing =
        tokio::spawn(async move { while sink.send(Message::binary(vec![STDIN; PIECE])).await.is_ok() {} });
    // More often than clients that wait for a minute need it.
    for _ in 0..10 {
        let heard = timeout(Duration::from_secs(20), stream.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(heard, Message::Pong(Bytes::new()));
    }
    typing.abort();
}

proptest! {
    /// Whatever a client puts into its messages, only input is input.
    #[test]
    fn any_messages_are_survived(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut expected = Vec::new();
            let mut open = true;
            let (mut stdin, mut sizes, mut channels) = Channels::new(ALL, V5);
            prop_assert!(sizes.take().is_none());
            for message in messages {
                match message.as_slice() {
                    [CLOSE, STDIN, ..] => open = false,
                    [STDIN, typed @ ..] if open => expected.extend_from_slice(typed),
                    _ => {}
                }
                prop_assert!(channels.lead(message.into(), &Peer::none()).await);
                while let Some(Ok(bytes)) = stdin.as_mut().map(mpsc::Receiver::try_recv) {
                    prop_assert!(expected.starts_with(&bytes));
                    expected.drain(..bytes.len());
                }
            }
            prop_assert!(expected.is_empty());
            Ok(())
        })?;
    }
}
