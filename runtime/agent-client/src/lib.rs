//! The only code that talks to the agent of a pod: in its VM, or, as the
//! supervisor of a host pod, on the host.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use husk_base::{chain, crash};
use husk_proto::agent::agent_client::AgentClient;
use husk_proto::agent::{GRPC_PORT, HelloRequest, STREAM_PORT, stream};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

mod bounds;
#[cfg(any(test, feature = "test-util"))]
pub mod fake;
mod wait;

pub use bounds::Bounded;

/// The longest time until the guest has accepted a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// The pause before a guest that refused, or was too slow to answer, is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// How many streams of one connection may have been given up and not yet answered: a
/// guest that stands still for minutes answers nothing, and its pod's usage is asked for
/// all the same.
const MAX_GIVEN_UP: usize = 1024;

/// How many late answers to such streams are taken before the connection is closed.
const MAX_LATE_ANSWERS: usize = 16 * 1024;

/// A connection to one agent.
#[derive(Clone, Debug)]
pub struct Agent {
    client: AgentClient<Channel>,
    /// A connection for waits for processes alone, made for the first one:
    /// calls that are given up cannot break it.
    waits: AgentClient<Channel>,
    vsock: PathBuf,
    timeout: Duration,
    silent: Option<Silent>,
    /// The agent is of a release that knows no confirmations of output.
    confirms_nothing: Arc<AtomicBool>,
}

/// An output of a container.
#[derive(Debug)]
pub enum Output {
    /// The agent keeps what is sent until it is confirmed: the stream, and the number of
    /// its first byte.
    Confirmed(UnixStream, u64),
    /// The stream of an agent that counts what it has sent as taken.
    Unconfirmed(UnixStream),
    /// The stream has ended, and all of it was confirmed.
    Ended,
}

/// Called when the agent has not answered in time.
#[derive(Clone)]
struct Silent(Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>);

impl fmt::Debug for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Silent")
    }
}

impl Agent {
    /// Connects through the unix socket of the VM's vsock device.
    ///
    /// # Errors
    /// The reason, in words.
    pub async fn connect(vsock: PathBuf, timeout: Duration) -> Result<Self, String> {
        let path = vsock.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { connect_patiently(&path, GRPC_PORT).await.map(TokioIo::new) }
        });
        // HTTP needs a name; the connector has the address.
        let endpoint = Endpoint::from_static("http://agent")
            .connect_timeout(timeout)
            .http2_max_concurrent_reset_streams(MAX_GIVEN_UP)
            .http2_max_local_error_reset_streams(MAX_LATE_ANSWERS);
        let channel =
            endpoint.connect_with_connector(connector.clone()).await.map_err(|error| chain(&error))?;
        let waits = endpoint.connect_with_connector_lazy(connector);
        let client = |channel| AgentClient::new(channel).max_decoding_message_size(bounds::MAX_ANSWER);
        Ok(Self {
            client: client(channel),
            waits: client(waits),
            vsock,
            timeout,
            silent: None,
            confirms_nothing: Arc::default(),
        })
    }

    /// Has `look` called, and waited for, when the agent does not answer a call
    /// in time: then the VM can be inspected, before its client ends it.
    #[must_use]
    pub fn when_silent<F>(mut self, look: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.silent = Some(Silent(Arc::new(move || look().boxed())));
        self
    }

    /// Calls an RPC that ends by itself, with the handler's time limit, and cuts the answer to
    /// its limits.
    ///
    /// # Errors
    /// The agent's error, or `DeadlineExceeded`.
    pub async fn call<T: Bounded>(
        &self,
        stage: &'static str,
        call: impl AsyncFnOnce(AgentClient<Channel>) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T, Error> {
        crash::point(format_args!("agent to be asked: {stage}"));
        let answer = tokio::time::timeout(self.timeout, call(self.client.clone())).await;
        crash::point(format_args!("agent has answered: {stage}"));
        match answer {
            Ok(Ok(response)) => {
                let mut answer = response.into_inner();
                answer.bound();
                Ok(answer)
            }
            Ok(Err(status)) => Err(Error::of(stage, &status)),
            Err(_) => {
                if let Some(Silent(look)) = &self.silent {
                    look().await;
                }
                let late = format!("no answer within {} s", self.timeout.as_secs());
                Err(Error::of(stage, &tonic::Status::deadline_exceeded(late)))
            }
        }
    }

    /// The agent's version of the protocol, and its release. An agent of
    /// a release before there were versions has 0, and an empty name.
    ///
    /// # Errors
    /// The same as those of [`Self::call`].
    pub async fn hello(&self) -> Result<(u32, String), Error> {
        let hello = async |mut agent: AgentClient<Channel>| agent.hello(HelloRequest {}).await;
        match self.call("ask which agent it is", hello).await {
            Ok(answer) => Ok((answer.protocol, answer.release)),
            Err(error) if error.status.code() == tonic::Code::Unimplemented => Ok((0, String::new())),
            Err(error) => Err(error),
        }
    }

    /// The client for calls that have a time limit of their own.
    #[must_use]
    pub fn unlimited(&self) -> AgentClient<Channel> {
        self.client.clone()
    }

    /// Opens one of a process's standard streams.
    ///
    /// # Errors
    /// The agent refuses, or does not answer in time.
    pub async fn open_stream(&self, header: &stream::StreamHeader) -> io::Result<UnixStream> {
        self.send_header(header).await?.map_err(|reason| {
            io::Error::other(format!("open {:?} of the process: agent says `{reason}`", header.kind))
        })
    }

    /// Opens an output of a container, from a byte on. An agent of an earlier release sends
    /// it from wherever it is.
    ///
    /// # Errors
    /// The agent refuses, or does not answer in time.
    pub async fn open_output(&self, header: &stream::OutputHeader) -> io::Result<Output> {
        if !self.confirms_nothing.load(Ordering::Relaxed) {
            match self.send_header(header).await? {
                Ok(mut socket) => {
                    let start = tokio::time::timeout(CONNECT_TIMEOUT, socket.read_u64()).await;
                    return match start.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                        Ok(start) => Ok(Output::Confirmed(socket, start)),
                        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Output::Ended),
                        Err(error) => Err(error),
                    };
                }
                Err(reason) if reason.starts_with(stream::BAD_HEADER) => {
                    self.confirms_nothing.store(true, Ordering::Relaxed);
                }
                Err(reason) => {
                    let refused = format!("open {:?} of the container: agent says `{reason}`", header.kind);
                    return Err(io::Error::other(refused));
                }
            }
        }
        let container_id = header.container_id.clone();
        let plain = stream::StreamHeader { kind: header.kind, container_id, process_id: String::new() };
        self.open_stream(&plain).await.map(Output::Unconfirmed)
    }

    /// Opens a connection to a port of the pod.
    ///
    /// # Errors
    /// No program listens there, or the agent does not answer in time.
    pub async fn open_port(&self, port: u16) -> io::Result<UnixStream> {
        self.send_header(&stream::PortHeader(port)).await?.map_err(io::Error::other)
    }

    /// Opens a connection with one line; the inner error is the agent's answer.
    async fn send_header(&self, header: &impl std::fmt::Display) -> io::Result<Result<UnixStream, String>> {
        let open = async {
            let mut socket = connect_port(&self.vsock, STREAM_PORT).await?;
            socket.write_all(format!("{header}\n").as_bytes()).await?;
            let answer = read_line(&mut socket).await?;
            Ok(match answer.as_str() {
                "OK" => Ok(socket),
                _ => Err(answer.strip_prefix("ERR ").unwrap_or(&answer).to_owned()),
            })
        };
        tokio::time::timeout(CONNECT_TIMEOUT, open)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// The agent failed at something.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {}", status.message())]
pub struct Error {
    /// The request.
    pub stage: &'static str,
    /// The agent's answer.
    pub status: Box<tonic::Status>,
    /// Whether there was no answer, because the connection failed.
    pub lost: bool,
}

impl Error {
    /// The agent's answer to `stage`, as far as it is passed on.
    #[must_use]
    pub fn of(stage: &'static str, status: &tonic::Status) -> Self {
        // Only an error of this side has a source.
        let lost = std::error::Error::source(status).is_some();
        Self { stage, status: Box::new(bounds::status(status)), lost }
    }
}

/// Does the same as [`connect_port`], for a port that the agent is known to listen on: a
/// guest that is slow to answer is asked again, for as long as the caller waits.
async fn connect_patiently(vsock: &Path, port: u32) -> io::Result<UnixStream> {
    loop {
        match connect_port(vsock, port).await {
            // The host's kernel refuses when the VMM has ended.
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused && error.raw_os_error().is_none() =>
            {
                tracing::debug!(vsock = %vsock.display(), "the guest has not answered yet");
                tokio::time::sleep(ASK_AGAIN).await;
            }
            done => return done,
        }
    }
}

/// Opens a connection to a port of the guest.
///
/// # Errors
/// No program listens there.
pub async fn connect_port(vsock: &Path, port: u32) -> io::Result<UnixStream> {
    let mut socket = UnixStream::connect(vsock).await?;
    socket.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let answer = read_line(&mut socket).await?;
    if answer.starts_with("OK ") {
        Ok(socket)
    } else {
        Err(io::Error::other(format!("the guest refused port {port}: `{answer}`")))
    }
}

/// Reads a short line, byte by byte, because the bytes after it belong to the stream.
async fn read_line(socket: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    while line.len() < stream::MAX_HEADER {
        match socket.read_u8().await {
            Ok(b'\n') => return Ok(String::from_utf8_lossy(&line).into_owned()),
            Ok(byte) => line.push(byte),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    format!("closed after `{}`", String::from_utf8_lossy(&line)),
                ));
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("answer too long"))
}

#[cfg(test)]
mod tests {
    use husk_proto::agent::{CreateContainerRequest, CreateContainerResponse, Identity};
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn no_more_is_taken_of_an_answer_than_huskd_has_a_use_for() {
        let identity = Identity { uid: 1, gid: 1, groups: (0..65_536).collect() };
        let fake = fake::Fake {
            created: CreateContainerResponse {
                pid: 7,
                identity: Some(identity),
                start_error: "x".repeat(100_000),
            },
            ..Default::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let agent = Arc::new(fake).serve(folder.path(), Duration::from_secs(20)).await;
        let create = async |mut agent: AgentClient<Channel>| {
            agent.create_container(CreateContainerRequest::default()).await
        };
        let answer = agent.call("create container", create).await.unwrap();
        let groups = answer.identity.unwrap().groups;
        assert_eq!((answer.pid, groups.len(), groups.last()), (7, 1024, Some(&1023)));
        assert_eq!(answer.start_error.len(), 4096);

        let refuse = async |_| Err::<tonic::Response<()>, _>(tonic::Status::internal("é".repeat(100_000)));
        let error = agent.call("refuse", refuse).await.unwrap_err();
        assert_eq!(error.status.code(), tonic::Code::Internal);
        assert!((4000..=4096).contains(&error.status.message().len()));
    }

    #[tokio::test]
    async fn a_connection_that_fails_is_no_answer_of_the_agents() {
        let folder = tempfile::tempdir().unwrap();
        let fake = fake::Fake { refusals: vec![tonic::Code::Internal].into(), ..Default::default() };
        let fake = Arc::new(fake);
        let agent = fake.serve(folder.path(), Duration::from_secs(20)).await;
        let start = async |mut agent: AgentClient<Channel>| {
            agent.start_container(husk_proto::agent::StartContainerRequest::default()).await
        };
        assert!(!agent.call("start", start).await.unwrap_err().lost);
        std::fs::remove_file(folder.path().join("vsock")).unwrap();
        fake.broken.send_replace(());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(agent.call("start", start).await.unwrap_err().lost);
    }

    #[tokio::test]
    async fn an_agent_of_a_release_without_versions_is_no_error() {
        for (release, expected) in [(None, (0, "")), (Some("9.0"), (husk_proto::agent::PROTOCOL, "9.0"))] {
            let folder = tempfile::tempdir().unwrap();
            let fake = fake::Fake { release: release.map(str::to_owned), ..Default::default() };
            let agent = Arc::new(fake).serve(folder.path(), Duration::from_secs(20)).await;
            assert_eq!(agent.hello().await.unwrap(), (expected.0, expected.1.to_owned()));
        }
    }

    #[tokio::test]
    async fn an_agent_that_knows_no_confirmations_sends_its_output_all_the_same() {
        let header = stream::OutputHeader { kind: stream::Kind::Stdout, container_id: "c".into(), from: 2 };
        for confirms_nothing in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let fake = fake::Fake { stdout: b"01234".to_vec(), confirms_nothing, ..Default::default() };
            let agent = Arc::new(fake).serve(folder.path(), Duration::from_secs(20)).await;
            for _ in 0..2 {
                let mut said = String::new();
                match agent.open_output(&header).await.unwrap() {
                    Output::Unconfirmed(mut socket) if confirms_nothing => {
                        socket.read_to_string(&mut said).await.unwrap();
                        assert_eq!(said, "01234");
                    }
                    Output::Confirmed(mut socket, 2) if !confirms_nothing => {
                        socket.read_to_string(&mut said).await.unwrap();
                        assert_eq!(said, "234");
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_too_long_is_an_error() {
        let fake = fake::Fake {
            created: CreateContainerResponse { start_error: "x".repeat(2 << 20), ..Default::default() },
            ..Default::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let agent = Arc::new(fake).serve(folder.path(), Duration::from_secs(20)).await;
        let create = async |mut agent: AgentClient<Channel>| {
            agent.create_container(CreateContainerRequest::default()).await
        };
        let error = agent.call("create container", create).await.unwrap_err();
        assert_eq!(error.status.code(), tonic::Code::OutOfRange);
    }

    #[tokio::test]
    async fn a_guest_that_is_slow_is_asked_again_and_a_vmm_that_has_gone_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let vmm = tokio::spawn(async move {
            // The VMM does so for a guest that does not answer in time.
            let (mut refused, _) = listener.accept().await.unwrap();
            assert_eq!(read_line(&mut refused).await.unwrap(), "CONNECT 7");
            drop(refused);
            let (mut client, _) = listener.accept().await.unwrap();
            assert_eq!(read_line(&mut client).await.unwrap(), "CONNECT 7");
            client.write_all(b"OK 1\n").await.unwrap();
        });
        connect_patiently(&path, 7).await.unwrap();
        vmm.await.unwrap();
        // Nothing listens any more, but the file is there.
        let gone = tokio::time::timeout(Duration::from_secs(10), connect_patiently(&path, 7)).await.unwrap();
        assert_eq!(gone.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
