//! An agent for tests, which answers as it is configured and notes the requests.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_base::lock;
use husk_proto::agent::agent_server::{Agent as Service, AgentServer};
use husk_proto::agent::stream::{BAD_HEADER, Kind, OutputHeader, StreamHeader};
use husk_proto::agent::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::{Agent, read_line};

/// The agent's behaviour.
#[derive(Debug, Default)]
pub struct Fake {
    /// The time that a command takes to start.
    pub start_takes: Duration,
    /// The standard output of every command.
    pub stdout: Vec<u8>,
    /// The standard error of every command.
    pub stderr: Vec<u8>,
    /// The agent is of a release that knows no confirmations of output.
    pub confirms_nothing: bool,
    /// How much of the standard output of containers is confirmed.
    pub confirmed: AtomicU64,
    /// Commands end when they are killed, and not before.
    pub endless: bool,
    /// No stream can be opened.
    pub without_streams: bool,
    /// The answer to CreateContainer.
    pub created: CreateContainerResponse,
    /// The first answers to StartContainer and RemoveContainer, one after the other.
    pub refusals: Mutex<Vec<Code>>,
    /// The answer to ContainerStats.
    pub stats: Mutex<ContainerStatsResponse>,
    /// The time that the agent's clock shows, which stands still.
    pub clock: Mutex<i64>,
    /// The signals that were sent, each with the process it was for.
    pub signals: Mutex<Vec<(String, u32)>>,
    /// A signal has killed the command.
    pub killed: watch::Sender<bool>,
    /// Every change breaks all connections.
    pub broken: watch::Sender<()>,
    /// The answer to another request for standard output.
    pub more: Option<Vec<u8>>,
    /// How often standard output was asked for, if there is more.
    pub asked: AtomicUsize,
    /// Some output was not taken when the command had ended.
    pub output_kept: bool,
    /// The exit code of commands.
    pub exit_code: i32,
    /// The agent's release; none for one from before `Hello`.
    pub release: Option<String>,
}

impl Fake {
    /// Serves below `folder`; answers with a client that is connected.
    pub async fn serve(self: &Arc<Self>, folder: &Path, timeout: Duration) -> Agent {
        let path = folder.join("vsock");
        self.serve_on(UnixListener::bind(&path).unwrap());
        Agent::connect(path, timeout).await.unwrap()
    }

    /// Serves every client that connects to `listener`.
    pub fn serve_on(self: &Arc<Self>, listener: UnixListener) {
        let (calls, incoming) = mpsc::channel(8);
        let service = AgentServer::new(Endpoint(self.clone()));
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(ReceiverStream::new(incoming)),
        );
        let fake = self.clone();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                // A client that has waited for long may have given up.
                let Ok(port) = read_line(&mut socket).await else { continue };
                if socket.write_all(b"OK 1\n").await.is_err() {
                    continue;
                }
                if port == format!("CONNECT {GRPC_PORT}") {
                    calls.send(Ok::<_, std::io::Error>(fake.breakable(socket))).await.unwrap();
                } else {
                    let (fake, mut broken) = (fake.clone(), fake.broken.subscribe());
                    tokio::spawn(async move {
                        tokio::select! {
                            () = fake.stream(socket) => {}
                            _ = broken.changed() => {}
                        }
                    });
                }
            }
        });
    }

    /// A connection between a client and the service that [`Self::broken`] cuts.
    fn breakable(&self, mut client: UnixStream) -> UnixStream {
        let (service, mut between) = UnixStream::pair().unwrap();
        let mut broken = self.broken.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut client, &mut between) => {}
                _ = broken.changed() => {}
            }
        });
        service
    }

    /// Waits until `count` signals were sent, and answers with them.
    pub async fn signals(&self, count: usize) -> Vec<(String, u32)> {
        loop {
            let signals = lock(&self.signals).clone();
            if signals.len() >= count {
                return signals;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn refused(&self) -> Option<Status> {
        let code = lock(&self.refusals).pop()?;
        Some(Status::new(code, "refused"))
    }

    async fn stream(self: Arc<Self>, mut socket: UnixStream) {
        let line = read_line(&mut socket).await.unwrap();
        if let Ok(header) = line.parse() {
            return self.output(socket, header).await;
        }
        let header: StreamHeader = line.parse().unwrap();
        if self.without_streams {
            socket.write_all(b"ERR out of streams\n").await.unwrap();
            return;
        }
        socket.write_all(b"OK\n").await.unwrap();
        // The reader may hang up.
        let _ = socket.write_all(&self.said(header.kind)).await;
        self.command_ends().await;
    }

    /// An output of a container: as much as its client has not confirmed.
    async fn output(&self, mut socket: UnixStream, header: OutputHeader) {
        if self.without_streams || self.confirms_nothing {
            let reason = if self.confirms_nothing { BAD_HEADER } else { "out of streams" };
            socket.write_all(format!("ERR {reason}\n").as_bytes()).await.unwrap();
            return;
        }
        let said = self.said(header.kind);
        let confirmed = if header.kind == Kind::Stdout { self.confirmed.load(Ordering::Relaxed) } else { 0 };
        let start = header.from.max(confirmed).min(said.len() as u64);
        let mut answer = b"OK\n".to_vec();
        answer.extend(start.to_be_bytes());
        answer.extend(said.get(usize::try_from(start).unwrap()..).unwrap());
        let (mut reader, mut writer) = socket.split();
        let send = async {
            let _ = writer.write_all(&answer).await;
            self.command_ends().await;
            let _ = writer.shutdown().await;
        };
        let listen = async {
            while let Ok(offset) = reader.read_u64().await {
                if header.kind == Kind::Stdout {
                    self.confirmed.fetch_max(offset, Ordering::Relaxed);
                }
            }
        };
        tokio::join!(send, listen);
    }

    /// The text of an output. A second request for standard output adds to the first.
    fn said(&self, kind: Kind) -> Vec<u8> {
        match (kind, &self.more) {
            (Kind::Stderr, _) => self.stderr.clone(),
            (_, Some(more)) if self.asked.fetch_add(1, Ordering::Relaxed) > 0 => {
                if self.confirms_nothing {
                    more.clone()
                } else {
                    [&*self.stdout, more].concat()
                }
            }
            _ => self.stdout.clone(),
        }
    }

    async fn command_ends(&self) {
        if self.endless {
            let _ = self.killed.subscribe().wait_for(|killed| *killed).await;
        }
    }
}

struct Endpoint(Arc<Fake>);

type Answer<T> = Result<Response<T>, Status>;

fn done<T: Default>() -> Answer<T> {
    Ok(Response::new(T::default()))
}

#[tonic::async_trait]
impl Service for Endpoint {
    async fn hello(&self, _: Request<HelloRequest>) -> Answer<HelloResponse> {
        let release = self.0.release.clone().ok_or_else(|| Status::unimplemented("of an earlier release"))?;
        Ok(Response::new(HelloResponse { protocol: PROTOCOL, release }))
    }

    async fn create_sandbox(&self, _: Request<CreateSandboxRequest>) -> Answer<CreateSandboxResponse> {
        done()
    }

    async fn adjust_clock(&self, request: Request<AdjustClockRequest>) -> Answer<AdjustClockResponse> {
        let mut clock = lock(&self.0.clock);
        *clock += request.into_inner().by_nanos;
        Ok(Response::new(AdjustClockResponse { time_unix_nanos: *clock }))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Answer<ShutdownResponse> {
        done()
    }

    async fn create_container(&self, _: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        Ok(Response::new(self.0.created.clone()))
    }

    async fn start_container(&self, _: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        self.0.refused().map_or_else(done, Err)
    }

    async fn remove_container(&self, _: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        self.0.refused().map_or_else(done, Err)
    }

    async fn update_container(&self, _: Request<UpdateContainerRequest>) -> Answer<UpdateContainerResponse> {
        done()
    }

    async fn exec_process(&self, _: Request<ExecProcessRequest>) -> Answer<ExecProcessResponse> {
        // As with the agent, the start goes on although its caller gives up.
        let started = tokio::spawn(tokio::time::sleep(self.0.start_takes));
        started.await.unwrap();
        done()
    }

    async fn signal_process(&self, request: Request<SignalProcessRequest>) -> Answer<SignalProcessResponse> {
        let request = request.into_inner();
        lock(&self.0.signals).push((request.process_id, request.signal));
        if request.signal == libc::SIGKILL.unsigned_abs() {
            self.0.killed.send_replace(true);
        }
        done()
    }

    async fn wait_process(&self, _: Request<WaitProcessRequest>) -> Answer<WaitProcessResponse> {
        self.0.command_ends().await;
        let (exit_code, output_kept) = (self.0.exit_code, self.0.output_kept);
        Ok(Response::new(WaitProcessResponse { exit_code, output_kept, ..Default::default() }))
    }

    async fn resize_terminal(&self, _: Request<ResizeTerminalRequest>) -> Answer<ResizeTerminalResponse> {
        done()
    }

    async fn write_volume(&self, _: Request<WriteVolumeRequest>) -> Answer<WriteVolumeResponse> {
        done()
    }

    async fn container_stats(&self, _: Request<ContainerStatsRequest>) -> Answer<ContainerStatsResponse> {
        Ok(Response::new(lock(&self.0.stats).clone()))
    }
}
