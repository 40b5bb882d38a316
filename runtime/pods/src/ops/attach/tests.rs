//! A container's input when its client vanishes, with an agent that only takes
//! connections.

use bytes::Bytes;
use husk_proto::cri::ContainerConfig;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::model::{ContainerRecord, Exit};
use crate::test_util::container_record;

const SOON: Duration = Duration::from_secs(10);

struct Fake {
    agent: Agent,
    container: Arc<Container>,
    /// Connections to the container's input.
    inputs: mpsc::Receiver<BufReader<UnixStream>>,
    _folder: tempfile::TempDir,
}

impl Fake {
    async fn new(stdin_once: bool, tty: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("containers")).unwrap();
        let record = ContainerRecord {
            config: ContainerConfig { stdin: true, stdin_once, tty, ..ContainerConfig::default() },
            ..container_record("c", "s")
        };
        let container = Arc::new(Container::create(folder.path(), record).await.unwrap());
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let (opened, inputs) = mpsc::channel(8);
        tokio::spawn(async move {
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                tokio::spawn(accept(BufReader::new(connection), opened.clone()));
            }
        });
        let agent = Agent::connect(path, SOON).await.unwrap();
        Self { agent, container, inputs, _folder: folder }
    }

    /// A client that has typed `words` comes and vanishes at once.
    async fn vanish(&mut self, words: &'static [&'static str]) -> ExitStatus {
        let (typed, stdin) = mpsc::channel(4);
        let gone = CancellationToken::new();
        for word in words {
            typed.send(Bytes::from_static(word.as_bytes())).await.unwrap();
        }
        let client =
            Client { stdin: Some(stdin), sizes: None, stdout: None, stderr: None, gone: gone.clone() };
        gone.cancel();
        drop(typed);
        timeout(SOON, run(&self.agent, &self.container, client)).await.unwrap()
    }

    async fn heard(&mut self) -> String {
        let mut input = timeout(SOON, self.inputs.recv()).await.unwrap().unwrap();
        let mut heard = String::new();
        timeout(SOON, input.read_to_string(&mut heard)).await.unwrap().unwrap();
        heard
    }
}

/// Answers as the agent does, and keeps what is no stream open.
async fn accept(mut connection: BufReader<UnixStream>, opened: mpsc::Sender<BufReader<UnixStream>>) {
    let mut line = String::new();
    connection.read_line(&mut line).await.unwrap();
    connection.write_all(line.replace("CONNECT", "OK").as_bytes()).await.unwrap();
    if line.contains(&husk_proto::agent::STREAM_PORT.to_string()) {
        line.clear();
        connection.read_line(&mut line).await.unwrap();
        assert_eq!(line, "STREAM stdin c\n");
        connection.write_all(b"OK\n").await.unwrap();
        opened.send(connection).await.unwrap();
    } else {
        std::future::pending().await
    }
}

#[tokio::test]
async fn input_that_ends_with_its_client_ends_when_the_client_vanishes() {
    // Which of both is noticed first must not matter.
    for _ in 0..10 {
        for (words, all) in [(&[][..], ""), (&["one ", "two"], "one two")] {
            let mut fake = Fake::new(true, false).await;
            fake.vanish(words).await;
            assert_eq!(fake.heard().await, all);
        }
    }
}

#[tokio::test]
async fn input_that_outlives_its_client_gets_what_was_typed_and_stays_open() {
    for (once, tty) in [(false, false), (true, true)] {
        let mut fake = Fake::new(once, tty).await;
        fake.vanish(&["one "]).await;
        fake.vanish(&[]).await;
        fake.vanish(&["two"]).await;
        let mut input = timeout(SOON, fake.inputs.recv()).await.unwrap().unwrap();
        let mut heard = [0; 7];
        timeout(SOON, input.read_exact(&mut heard)).await.unwrap().unwrap();
        assert_eq!(&heard, b"one two");
        assert!(timeout(Duration::from_millis(200), input.read_u8()).await.is_err());
    }
}

#[tokio::test]
async fn typing_for_a_container_that_has_ended_is_over() {
    let fake = Fake::new(true, false).await;
    let (typed, stdin) = mpsc::channel(4);
    let typing = type_all(fake.agent.clone(), fake.container.clone(), stdin, true);
    assert!(fake.container.record_exit(Exit::reported(0, false, 1), || ()).await);
    assert!(!timeout(SOON, typing).await.unwrap().unwrap());
    drop(typed);
}
