//! Pumps between real pipes and real sockets.

use std::fs::File;
use std::io::{Read, Write};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::command::UNCLAIMED;
use super::*;
use crate::process::reaper::Exit;

const SOON: Duration = Duration::from_secs(5);

fn ended() -> Option<Exit> {
    Some(Exit { code: 0, signal: None, unix_nanos: 0, instant: Instant::now() })
}

struct Output {
    process: File,
    clients: mpsc::Sender<OutputClient<UnixStream>>,
    exit: watch::Sender<Option<Exit>>,
    kept: watch::Receiver<bool>,
    pump: tokio::task::JoinHandle<End>,
}

fn start_output() -> Output {
    start(OutputOwner::Container)
}

fn start(owner: OutputOwner) -> Output {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (clients, receiver) = mpsc::channel(1);
    let (exit, exited) = watch::channel(None);
    let (keep, kept) = watch::channel(false);
    let pump = tokio::spawn(output(AsyncFile::reader(reader).unwrap(), receiver, owner, exited, keep));
    Output { process: File::from(writer), clients, exit, kept, pump }
}

impl Output {
    /// The process closes its end.
    fn close(&mut self) {
        self.process = File::open("/dev/null").unwrap();
    }

    async fn connect(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.clients.send(OutputClient { connection: theirs, from: None }).await.unwrap();
        ours
    }

    /// Connects a client that confirms, and has all bytes before `from`. Returns the
    /// number of the first byte that it gets.
    async fn connect_from(&self, from: u64) -> (UnixStream, u64) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        self.clients.send(OutputClient { connection: theirs, from: Some(from) }).await.unwrap();
        let start = timeout(SOON, ours.read_u64()).await.unwrap().unwrap();
        (ours, start)
    }
}

async fn read_to_end(mut client: UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    timeout(SOON, client.read_to_end(&mut all)).await.unwrap().unwrap();
    all
}

#[tokio::test]
async fn output_before_the_client_waits_for_it() {
    let mut stream = start_output();
    stream.process.write_all(b"early ").unwrap();
    let client = stream.connect().await;
    stream.process.write_all(b"late").unwrap();
    drop(stream.process);
    assert_eq!(read_to_end(client).await, b"early late");
    timeout(SOON, stream.pump).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_breaks_off_is_followed_by_another() {
    let mut stream = start_output();
    drop(stream.connect().await);
    stream.process.write_all(b"for the second").unwrap();
    let client = stream.connect().await;
    drop(stream.process);
    assert_eq!(read_to_end(client).await, b"for the second");
}

#[tokio::test]
async fn the_only_client_of_a_stream_takes_it_along() {
    // Whether it is silent or not, the process gets an error when it writes
    // again.
    for silent in [true, false] {
        let mut stream = start(OutputOwner::Command);
        let mut client = stream.connect().await;
        stream.process.write_all(b"x").unwrap();
        client.read_u8().await.unwrap();
        drop(client);
        if !silent {
            stream.process.write_all(b"for nobody").unwrap();
        }
        assert_eq!(timeout(SOON, stream.pump).await.unwrap().unwrap(), End::Abandoned);
        assert!(stream.process.write_all(b"y").is_err());
    }
}

#[tokio::test]
async fn a_newer_client_replaces_the_one_before() {
    let mut stream = start_output();
    let first = stream.connect().await;
    let second = stream.connect().await;
    assert_eq!(read_to_end(first).await, b"");
    stream.process.write_all(b"x").unwrap();
    drop(stream.process);
    assert_eq!(read_to_end(second).await, b"x");
}

#[tokio::test]
async fn a_silent_stream_without_client_ends_with_its_process() {
    let stream = start_output();
    drop(stream.process);
    timeout(SOON, stream.pump).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_a_client_has_not_confirmed_is_sent_to_the_next() {
    let mut stream = start_output();
    let (mut client, start) = stream.connect_from(0).await;
    assert_eq!(start, 0);
    stream.process.write_all(b"one\ntwo\nthree\n").unwrap();
    let mut read = [0; 14];
    client.read_exact(&mut read).await.unwrap();
    client.write_u64(4).await.unwrap();
    // One dies with what it has read; the next knows by its log that it has a line more.
    drop(client);
    let (mut client, start) = stream.connect_from(8).await;
    assert_eq!(start, 8);
    let mut read = [0; 6];
    client.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"three\n");
    drop(client);
    // One that knows nothing gets all that was never confirmed, whoever it is.
    let (client, start) = stream.connect_from(0).await;
    assert_eq!(start, 8);
    drop(client);
    stream.close();
    stream.exit.send_replace(ended());
    let mut client = stream.connect_from(8).await.0;
    let mut rest = Vec::new();
    timeout(SOON, client.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"three\n");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!stream.pump.is_finished(), "the end of the stream is not confirmed");
    client.write_u64(14).await.unwrap();
    timeout(SOON, stream.pump).await.unwrap().unwrap();
    assert!(stream.kept.has_changed().is_err() && !*stream.kept.borrow());
}

#[tokio::test]
async fn a_client_that_confirms_nothing_holds_the_process_up() {
    let mut stream = start_output();
    let (mut client, _) = stream.connect_from(0).await;
    let reader = tokio::spawn(async move {
        let mut all = Vec::new();
        let mut piece = vec![0; 4096];
        while let Ok(Ok(count)) = timeout(Duration::from_millis(300), client.read(&mut piece)).await {
            all.extend_from_slice(&piece[..count]);
        }
        (client, all)
    });
    let sent = fill(&mut stream.process).await;
    let (mut client, all) = reader.await.unwrap();
    // The pipe of the process holds the rest.
    assert!(all.len() < sent.len() && all.len() <= 160 * 1024, "{} of {}", all.len(), sent.len());
    client.write_u64(all.len() as u64).await.unwrap();
    assert_eq!(timeout(SOON, client.read_u8()).await.unwrap().unwrap(), sent[all.len()]);
}

#[tokio::test]
async fn output_that_nobody_takes_is_kept_after_the_exit_to_its_last_byte() {
    let mut stream = start_output();
    let sent = fill(&mut stream.process).await;
    stream.close();
    tokio::time::pause();
    tokio::time::sleep(CLIENT_TIMEOUT * 3).await;
    assert!(!*stream.kept.borrow(), "while the process runs, its output just waits");
    stream.exit.send_replace(ended());
    let before = Instant::now();
    assert!(*stream.kept.wait_for(|kept| *kept).await.unwrap());
    assert!(before.elapsed() >= CLIENT_TIMEOUT && before.elapsed() < CLIENT_TIMEOUT * 2);
    tokio::time::sleep(Duration::from_secs(24 * 3600)).await;
    assert!(!stream.pump.is_finished());
    tokio::time::resume();
    // A client that breaks off does not end the stream.
    let (gone, _) = UnixStream::pair().unwrap();
    stream.clients.send(OutputClient { connection: gone, from: None }).await.unwrap();
    let ours = stream.connect().await;
    assert!(read_to_end(ours).await == sent);
    assert_eq!(timeout(SOON, stream.pump).await.unwrap().unwrap(), End::Over);
}

#[tokio::test(start_paused = true)]
async fn output_that_is_taken_is_not_kept() {
    let mut stream = start_output();
    let client = stream.connect().await;
    stream.process.write_all(b"taken").unwrap();
    drop(stream.process);
    stream.exit.send_replace(ended());
    assert!(stream.kept.wait_for(|kept| *kept).await.is_err(), "the pump is over");
    assert_eq!(read_to_end(client).await, b"taken");
}

#[tokio::test(start_paused = true)]
async fn a_child_left_behind_does_not_hold_the_stream_for_long() {
    let mut stream = start_output();
    let client = stream.connect().await;
    stream.process.write_all(b"last words").unwrap();
    stream.exit.send_replace(ended());
    let before = Instant::now();
    stream.pump.await.unwrap();
    assert!(before.elapsed() < LINGER * 2, "the pipe's write end is still open here");
    assert_eq!(read_to_end(client).await, b"last words");
}

#[tokio::test(start_paused = true)]
async fn a_terminal_is_not_held_for_long_by_a_child_left_behind() {
    let mut stream = start(OutputOwner::Session);
    let client = stream.connect().await;
    stream.process.write_all(b"last words").unwrap();
    stream.exit.send_replace(ended());
    assert_eq!(stream.pump.await.unwrap(), End::Over);
    assert_eq!(read_to_end(client).await, b"last words");
}

#[tokio::test(start_paused = true)]
async fn a_command_is_over_when_its_children_are() {
    let mut stream = start(OutputOwner::Command);
    let client = stream.connect().await;
    stream.exit.send_replace(ended());
    tokio::time::sleep(Duration::from_secs(3600)).await;
    stream.process.write_all(b"of a child").unwrap();
    drop(stream.process);
    assert_eq!(stream.pump.await.unwrap(), End::Over);
    assert_eq!(read_to_end(client).await, b"of a child");
}

/// Writes until neither the pipe nor the pump takes more.
async fn fill(process: &mut File) -> Vec<u8> {
    fcntl(&*process, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let (mut sent, mut refused) = (Vec::new(), 0);
    while refused < 5 {
        let data: Vec<u8> = (0..4096).map(|n| (sent.len() + n) as u8).collect();
        match process.write(&data) {
            Ok(count) => {
                sent.extend_from_slice(&data[..count]);
                refused = 0;
            }
            Err(_) => {
                refused += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    sent
}

#[tokio::test]
async fn a_command_waits_for_its_client_to_take_what_it_said() {
    for owner in [OutputOwner::Command, OutputOwner::Session] {
        let mut stream = start(owner);
        let client = stream.connect().await;
        let sent = fill(&mut stream.process).await;
        drop(stream.process);
        stream.exit.send_replace(ended());
        tokio::time::pause();
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(!stream.pump.is_finished(), "{owner:?}");
        tokio::time::resume();
        assert!(read_to_end(client).await == sent, "{owner:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_command_that_nobody_asks_about_is_given_up_after_its_end() {
    for says in [&b"lost"[..], b""] {
        let mut stream = start(OutputOwner::Command);
        stream.process.write_all(says).unwrap();
        stream.exit.send_replace(ended());
        let before = Instant::now();
        assert_eq!(stream.pump.await.unwrap(), End::Over);
        assert!(before.elapsed() >= UNCLAIMED && before.elapsed() < UNCLAIMED * 3);
    }
}

#[tokio::test]
async fn a_slow_client_gets_all_that_the_pipe_held() {
    let mut stream = start_output();
    let client = stream.connect().await;
    let data: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    let expected = data.clone();
    let writer = std::thread::spawn(move || stream.process.write_all(&data));
    stream.exit.send_replace(ended());
    assert!(read_to_end(client).await == expected);
    writer.join().unwrap().unwrap();
}

struct Stdin {
    process: File,
    clients: mpsc::Sender<Input<UnixStream>>,
    exit: watch::Sender<Option<Exit>>,
    pump: tokio::task::JoinHandle<()>,
}

fn start_input(once: bool) -> Stdin {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (clients, receiver) = mpsc::channel(1);
    let (exit, exited) = watch::channel(None);
    let pump = tokio::spawn(input(AsyncFile::writer(writer).unwrap(), receiver, once, exited));
    Stdin { process: File::from(reader), clients, exit, pump }
}

impl Stdin {
    async fn connect(&self, early: &[u8]) -> UnixStream {
        let (ours, connection) = UnixStream::pair().unwrap();
        self.clients.send(Input { connection, early: early.to_vec() }).await.unwrap();
        ours
    }
}

#[tokio::test]
async fn input_once_ends_with_its_first_client() {
    let mut stdin = start_input(true);
    let mut client = stdin.connect(b"early ").await;
    client.write_all(b"late").await.unwrap();
    client.shutdown().await.unwrap();
    timeout(SOON, stdin.pump).await.unwrap().unwrap();
    let mut all = Vec::new();
    stdin.process.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"early late");
}

#[tokio::test]
async fn input_stays_open_for_the_next_client() {
    let mut stdin = start_input(false);
    for word in [b"one", b"two"] {
        let mut client = stdin.connect(b"").await;
        client.write_all(word).await.unwrap();
        drop(client);
        let mut read = [0; 3];
        let mut process = stdin.process.try_clone().unwrap();
        tokio::task::spawn_blocking(move || process.read_exact(&mut read).map(|()| assert_eq!(&read, word)))
            .await
            .unwrap()
            .unwrap();
    }
    stdin.exit.send_replace(ended());
    timeout(SOON, stdin.pump).await.unwrap().unwrap();
    assert_eq!(stdin.process.read(&mut [0]).unwrap(), 0);
}

#[tokio::test]
async fn input_to_a_process_that_does_not_read_ends_with_it() {
    let stdin = start_input(false);
    let mut client = stdin.connect(b"").await;
    let flood = vec![0; 1024 * 1024];
    assert!(timeout(Duration::from_millis(100), client.write_all(&flood)).await.is_err());
    stdin.exit.send_replace(ended());
    timeout(SOON, stdin.pump).await.unwrap().unwrap();
}
