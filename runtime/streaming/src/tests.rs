//! Tests of the server from a client's side of the network.

#![allow(clippy::indexing_slicing)]

use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::spdy::tests::{Heard, TestClient};
use super::*;

const SOON: Duration = Duration::from_secs(10);
const SPDY: &str = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
const ALL: StreamOptions = StreamOptions { stdin: true, stdout: true, stderr: false, terminal: false };

fn serving() -> Arc<Streaming> {
    let streaming = Arc::new(Streaming::listen(([127, 0, 0, 1], 0).into()).unwrap());
    drop(tokio::spawn(streaming.clone().serve()));
    streaming
}

/// A session that repeats its input, and ends so.
fn repeat(ending: ExitStatus) -> Run {
    Box::new(|client| {
        async {
            let Client { stdin, stdout, .. } = client;
            let (mut stdin, stdout) = (stdin.unwrap(), stdout.unwrap());
            while let Some(bytes) = stdin.recv().await {
                stdout.send(bytes).await.unwrap();
            }
            stdout.finish().await.unwrap();
            ending
        }
        .boxed()
    })
}

/// Sends a request's head; answers with the connection and the answer's head,
/// or the whole answer if it is no upgrade.
async fn request(url: &str, headers: &str) -> (TcpStream, String) {
    let (address, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut socket = TcpStream::connect(address).await.unwrap();
    let head = format!("POST /{path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    while !answer.ends_with("\r\n\r\n") {
        answer.push(timeout(SOON, socket.read_u8()).await.unwrap().unwrap().into());
    }
    if !answer.starts_with("HTTP/1.1 101") {
        timeout(SOON, socket.read_to_string(&mut answer)).await.unwrap().unwrap();
    }
    (socket, answer)
}

async fn spdy_exec(streaming: &Streaming, protocols: &str, ending: ExitStatus) -> (String, String) {
    let url = streaming.offer(Session::Exec(ALL, repeat(ending))).unwrap();
    let (socket, answer) = request(&url, &format!("{SPDY}{protocols}")).await;
    let mut client = TestClient::new(socket);
    let error = client.open(&[("streamtype", "error")]).await;
    let stdin = client.open(&[("streamtype", "stdin")]).await;
    let stdout = client.open(&[("streamtype", "stdout")]).await;
    client.data(stdin, b"typed", true).await;
    let mut heard = client.hear_all().await;
    assert_eq!(heard.remove(&stdout).unwrap(), (b"typed".to_vec(), true));
    assert_eq!(heard.remove(&stdin).unwrap(), (Vec::new(), true));
    let (words, ended) = heard.remove(&error).unwrap();
    assert!(ended);
    (answer.to_lowercase(), String::from_utf8(words).unwrap())
}

#[tokio::test]
async fn exec_over_spdy_in_every_version() {
    let streaming = serving();
    let v4 =
        "X-Stream-Protocol-Version: v5.channel.k8s.io\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";
    let (answer, words) = spdy_exec(&streaming, v4, ExitStatus::Exit(3)).await;
    assert!(answer.contains("x-stream-protocol-version: v4.channel.k8s.io"), "{answer}");
    assert!(answer.contains("upgrade: spdy/3.1"), "{answer}");
    assert!(words.contains("NonZeroExitCode"), "{words}");
    let v2 = "X-Stream-Protocol-Version: v2.channel.k8s.io\r\n";
    assert_eq!(spdy_exec(&streaming, v2, ExitStatus::Success).await.1, "");
    let (answer, words) = spdy_exec(&streaming, "", ExitStatus::Failed("no".into())).await;
    assert!(!answer.contains("x-stream-protocol"), "{answer}");
    assert_eq!(words, "no");
}

#[tokio::test]
async fn exec_over_websocket_in_every_version() {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use futures::{SinkExt, StreamExt};
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::Role;
    let streaming = serving();
    let run: fn() -> Run = || {
        Box::new(|client| {
            async {
                let Client { stdin, stdout, .. } = client;
                let typed = stdin.unwrap().recv().await.unwrap();
                stdout.unwrap().send(typed).await.unwrap();
                ExitStatus::Exit(3)
            }
            .boxed()
        })
    };
    for (name, base64, status) in [
        ("v5.channel.k8s.io", false, true),
        ("v4.channel.k8s.io", false, true),
        ("v4.base64.channel.k8s.io", true, true),
        ("channel.k8s.io", false, false),
        ("base64.channel.k8s.io", true, false),
        ("", false, false),
    ] {
        let url = streaming.offer(Session::Exec(ALL, run())).unwrap();
        let mut headers = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                           Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            .to_owned();
        if !name.is_empty() {
            headers += &format!("Sec-WebSocket-Protocol: {name}\r\n");
        }
        let (socket, answer) = request(&url, &headers).await;
        let answer = answer.to_lowercase();
        let told = answer.lines().find_map(|line| line.strip_prefix("sec-websocket-protocol: "));
        assert_eq!(told.unwrap_or_default(), name);
        let mut socket = WebSocketStream::from_raw_socket(socket, Role::Client, None).await;
        let (typed, first, output) = match base64 {
            true => (Message::text("0aGk="), Message::text("1"), Message::text("1aGk=")),
            false => (
                Message::binary(&b"\0hi"[..]),
                Message::binary(&b"\x01"[..]),
                Message::binary(&b"\x01hi"[..]),
            ),
        };
        socket.send(typed).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), first, "{name}");
        assert_eq!(socket.next().await.unwrap().unwrap(), output, "{name}");
        let words = socket.next().await.unwrap().unwrap().into_data();
        let words = match base64 {
            true => STANDARD.decode(&words[1..]).unwrap(),
            false => words[1..].to_vec(),
        };
        let words = String::from_utf8(words).unwrap();
        assert!(words.contains("non-zero exit code: 3"), "{name}: {words}");
        assert_eq!(words.contains("NonZeroExitCode"), status, "{name}: {words}");
    }
}

#[tokio::test]
async fn wrong_tokens_and_requests_are_refused() {
    let streaming = serving();
    let offer = || streaming.offer(Session::Exec(ALL, repeat(ExitStatus::Success))).unwrap();
    let refused = async |url: &str, headers: &str, status: &str, words: &str| {
        let (_, answer) = request(url, headers).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        assert!(answer.contains(words), "{answer}");
    };
    let url = offer();
    refused(&url[..url.len() - 1], SPDY, "404", "not known").await;
    refused(&url.replace("exec", "attach"), SPDY, "404", "not known").await;
    // The URL works once.
    refused(&url, SPDY, "404", "used already").await;
    refused(&offer(), "", "400", "upgrade").await;
    let other = format!("{SPDY}X-Stream-Protocol-Version: v9.channel.k8s.io\r\n");
    refused(&offer(), &other, "403", "x-accepted-stream-protocol-versions: v4.channel.k8s.io").await;
    let websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let other = format!("{websocket}Sec-WebSocket-Protocol: v9.channel.k8s.io\r\n");
    refused(&offer(), &other, "400", "v5.channel.k8s.io").await;
    let ports = || streaming.offer(Session::Ports(Arc::new(|_| unreachable!()))).unwrap();
    refused(&ports(), websocket, "400", "SPDY/3.1+portforward.k8s.io").await;
    refused(&offer(), &format!("X: {}\r\n", "x".repeat(20_000)), "431", "").await;
}

#[tokio::test]
async fn a_client_that_says_nothing_is_not_waited_for() {
    let streaming = serving();
    let mut socket = TcpStream::connect(streaming.address).await.unwrap();
    socket.write_all(b"POST /exec/").await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(SOON * 3, socket.read_to_end(&mut answer)).await.unwrap();
}

#[tokio::test]
async fn silent_connections_do_not_keep_a_client_with_a_token_out() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // Both ends of each connection are this process's.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let streaming = serving();
    let mut silent = Vec::new();
    for _ in 0..1000 {
        silent.push(timeout(SOON, TcpStream::connect(streaming.address)).await.unwrap().unwrap());
    }
    // Sooner than the silent ones are given up for their silence.
    let exec = spdy_exec(&streaming, "", ExitStatus::Success);
    timeout(SOON / 2, exec).await.expect("the session was kept out");
    // The client was let in because the oldest connections were closed, and no others.
    let mut end = [0];
    let oldest = timeout(SOON / 2, silent[0].read(&mut end)).await.expect("the oldest is still open");
    assert_eq!(oldest.unwrap(), 0);
    let newest = silent.last_mut().unwrap();
    assert!(timeout(Duration::from_millis(200), newest.read(&mut end)).await.is_err());
}

/// A client of port-forward, with no stream yet.
async fn ports_over_spdy(streaming: &Streaming, connect: Connect) -> TestClient<TcpStream> {
    let url = streaming.offer(Session::Ports(connect)).unwrap();
    let (socket, _) =
        request(&url, &format!("{SPDY}X-Stream-Protocol-Version: portforward.k8s.io\r\n")).await;
    TestClient::new(socket)
}

#[tokio::test]
async fn ports_are_forwarded_in_pairs_of_streams() {
    let streaming = serving();
    let connect = |port| {
        async move {
            if port != 80 {
                return Err(std::io::Error::other("refused"));
            }
            let (ours, mut pod) = UnixStream::pair()?;
            tokio::spawn(async move {
                let mut heard = Vec::new();
                pod.read_to_end(&mut heard).await.unwrap();
                pod.write_all(&heard).await.unwrap();
            });
            Ok(ours)
        }
        .boxed()
    };
    let mut client = ports_over_spdy(&streaming, Arc::new(connect)).await;
    let mut pairs = Vec::new();
    for (id, port) in [("0", "80"), ("1", "81"), ("2", "80")] {
        let headers = |kind| [("streamtype", kind), ("port", port), ("requestid", id)];
        let error = client.open(&headers("error")).await;
        client.data(error, b"", true).await;
        pairs.push((error, client.open(&headers("data")).await));
    }
    // Beside them, what makes no sense.
    for headers in [&[("streamtype", "data"), ("port", "0")][..], &[("port", "80")], &[]] {
        let number = client.open(headers).await;
        while !matches!(client.hear().await.unwrap(), Heard::Control(spdy::tests::Control::RstStream { stream, .. }) if stream == number)
        {
        }
    }
    let bytes = vec![5; 100_000];
    for (_, data) in [pairs[0], pairs[2]] {
        client.data(data, &bytes, true).await;
    }
    let mut heard = std::collections::HashMap::<u32, (Vec<u8>, bool)>::new();
    while heard.values().filter(|(_, ended)| *ended).count() < 4 {
        if let Heard::Data(stream, bytes, fin) = client.hear().await.unwrap() {
            let stream = heard.entry(stream).or_default();
            stream.0.extend_from_slice(&bytes);
            stream.1 = fin;
        }
    }
    for (error, data) in [pairs[0], pairs[2]] {
        assert!(heard[&data].0 == bytes);
        assert_eq!(heard[&error].0, b"");
    }
}

/// A client with one connection to a port: its streams of errors and of data,
/// and the port's side.
async fn forwarded(streaming: &Streaming) -> (TestClient<TcpStream>, u32, u32, UnixStream) {
    let (asked, mut pods) = tokio::sync::mpsc::channel(1);
    let connect = move |_| {
        let asked = asked.clone();
        async move {
            let (ours, pod) = UnixStream::pair()?;
            asked.send(pod).await.unwrap();
            Ok(ours)
        }
        .boxed()
    };
    let mut client = ports_over_spdy(streaming, Arc::new(connect)).await;
    let error = client.open(&[("streamtype", "error"), ("port", "80")]).await;
    let data = client.open(&[("streamtype", "data"), ("port", "80")]).await;
    (client, error, data, pods.recv().await.unwrap())
}

#[tokio::test]
async fn a_half_closed_forward_waits_for_days_for_the_answer() {
    let streaming = serving();
    let (mut client, error, data, mut pod) = forwarded(&streaming).await;
    client.data(data, b"question", true).await;
    let mut question = Vec::new();
    timeout(SOON, pod.read_to_end(&mut question)).await.unwrap().unwrap();
    assert_eq!(question, b"question");
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(3 * 86_400)).await;
    tokio::time::resume();
    pod.write_all(b"answer").await.unwrap();
    drop(pod);
    assert_eq!(client.hear().await, Some(Heard::Data(data, b"answer".to_vec(), false)));
    assert_eq!(client.hear().await, Some(Heard::Data(data, Vec::new(), true)));
    assert_eq!(client.hear().await, Some(Heard::Data(error, Vec::new(), true)));
}

#[tokio::test]
async fn a_forward_that_the_pod_ends_is_over_for_the_client_which_may_go_on() {
    let streaming = serving();
    let (mut client, error, data, mut pod) = forwarded(&streaming).await;
    pod.write_all(b"bye").await.unwrap();
    pod.shutdown().await.unwrap();
    assert_eq!(client.hear().await, Some(Heard::Data(data, b"bye".to_vec(), false)));
    assert_eq!(client.hear().await, Some(Heard::Data(data, Vec::new(), true)));
    assert_eq!(client.hear().await, Some(Heard::Data(error, Vec::new(), true)));
    client.data(data, b"not yet", true).await;
    let mut heard = String::new();
    timeout(SOON, pod.read_to_string(&mut heard)).await.unwrap().unwrap();
    assert_eq!(heard, "not yet");
}

#[tokio::test]
async fn a_client_that_goes_before_its_streams_are_open_leaves_nothing() {
    let streaming = serving();
    let held = Arc::new(());
    let weak = Arc::downgrade(&held);
    let run: Run = Box::new(|_| {
        drop(held);
        async { ExitStatus::Success }.boxed()
    });
    let url = streaming.offer(Session::Exec(ALL, run)).unwrap();
    let (socket, _) = request(&url, SPDY).await;
    let mut client = TestClient::new(socket);
    client.open(&[("streamtype", "error")]).await;
    drop(client);
    timeout(SOON, async {
        while weak.strong_count() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn spdy_goes_through_a_websocket() {
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::protocol::Role;
    let streaming = serving();
    let connect = |_| {
        async {
            let (ours, mut pod) = UnixStream::pair()?;
            tokio::spawn(async move { pod.write_all(b"welcome").await });
            Ok(ours)
        }
        .boxed()
    };
    let url = streaming.offer(Session::Ports(Arc::new(connect))).unwrap();
    let headers = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                   Sec-WebSocket-Protocol: SPDY/3.1+portforward.k8s.io\r\n";
    let (socket, answer) = request(&url, headers).await;
    assert!(answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{answer}");
    let socket = WebSocketStream::from_raw_socket(socket, Role::Client, None).await;
    let mut client = TestClient::new(tunnel::Tunnel::new(socket));
    let error = client.open(&[("streamtype", "error"), ("port", "80")]).await;
    let data = client.open(&[("streamtype", "data"), ("port", "80")]).await;
    client.data(data, b"", true).await;
    assert_eq!(client.hear().await, Some(Heard::Data(data, b"welcome".to_vec(), false)));
    assert_eq!(client.hear().await, Some(Heard::Data(data, Vec::new(), true)));
    assert_eq!(client.hear().await, Some(Heard::Data(error, Vec::new(), true)));
}

#[tokio::test]
async fn a_piece_is_never_longer_than_it_may_be() {
    let (socket, mut guest) = UnixStream::pair().unwrap();
    guest.write_all(&vec![1; 100_000]).await.unwrap();
    drop(guest);
    let mut total = 0;
    loop {
        let piece: Bytes = pump::read(&socket).await.unwrap().freeze();
        assert!(piece.len() <= pipe::PIECE);
        total += piece.len();
        if piece.is_empty() {
            break;
        }
    }
    assert_eq!(total, 100_000);
}
