//! The gRPC service. Each file below holds RPCs, from the request to the
//! answer.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use husk_proto::agent::agent_server::{Agent as Service, AgentServer};
use husk_proto::agent::*;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};

use crate::connection::Incoming;
use crate::container::Containers;
use crate::container::images::Images;
use crate::error::{Error, Stage};
use crate::guest::disks::Disks;
use crate::guest::mode::Mode;
use crate::pod::apparmor::Policies;
use crate::pod::shared_dir::SharedDir;
use crate::process::reaper::Reaper;
use crate::process::runc::Runc;

mod container;
mod process;
mod sandbox;
mod stats;
pub mod streams;
#[cfg(test)]
mod tests;
mod volume;

/// Most bytes of a request: an OCI configuration and some more.
const MAX_MESSAGE: usize = 8 * 1024 * 1024;

/// Most requests that huskd gave up before they were read. In a machine that
/// stood still they arrive all at once when it continues; a lower limit would
/// break the connection then.
const MAX_GIVEN_UP: usize = 4096;

/// How long the last answers may take to reach the host before the machine goes
/// down.
const DRAIN_DEADLINE: Duration = Duration::from_millis(500);

/// The agent's state.
pub struct Agent {
    /// The pod's containers.
    pub containers: Arc<Containers>,
    mode: Arc<Mode>,
    reaper: Reaper,
    runc: Runc,
    disks: Disks,
    images: Arc<Images>,
    shared: SharedDir,
    policies: Policies,
    /// Held while a synced volume changes.
    syncing: tokio::sync::Mutex<()>,
    /// Set when `CreateSandbox` begins; its content is set when that has
    /// succeeded.
    sandbox: OnceLock<OnceLock<()>>,
    /// Whether the pod has a pid namespace that containers share.
    pid_namespace: tokio::sync::Mutex<bool>,
    /// The machine's user and group for root in the containers, when the pod
    /// has a user namespace.
    mapped_root: OnceLock<(u32, u32)>,
    /// Held while a writable layer is measured, one at a time.
    measuring: Arc<tokio::sync::Mutex<()>>,
    /// The task that trims the sandbox disk.
    trimming: OnceLock<AbortOnDropHandle<()>>,
    power_off: Notify,
}

impl Agent {
    /// Makes the agent of a machine that is not a pod yet.
    pub fn new(reaper: Reaper, mode: Arc<Mode>) -> Self {
        Self {
            containers: Arc::default(),
            runc: Runc::new(reaper.clone(), &mode),
            reaper,
            disks: Disks::default(),
            images: Arc::new(Images::new(mode.clone())),
            mode,
            shared: SharedDir::default(),
            policies: Policies::default(),
            syncing: tokio::sync::Mutex::default(),
            sandbox: OnceLock::new(),
            pid_namespace: tokio::sync::Mutex::default(),
            mapped_root: OnceLock::new(),
            measuring: Arc::default(),
            trimming: OnceLock::new(),
            power_off: Notify::new(),
        }
    }
}

/// Serves until the answer to `Shutdown` is sent.
pub async fn serve(incoming: Incoming, agent: Arc<Agent>) -> Result<(), tonic::transport::Error> {
    let service = AgentServer::new(Endpoint(agent.clone())).max_decoding_message_size(MAX_MESSAGE);
    let power_off = Notify::new();
    let serving = tonic::transport::Server::builder()
        .http2_max_pending_accept_reset_streams(Some(MAX_GIVEN_UP))
        .http2_max_local_error_reset_streams(Some(MAX_GIVEN_UP))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, power_off.notified());
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => return ended,
        () = agent.power_off.notified() => power_off.notify_one(),
    }
    // Idle connections are closed at once, the others when they have their
    // answers; a client that does not read its answers does not delay the end.
    let _ = timeout(DRAIN_DEADLINE, serving).await;
    Ok(())
}

struct Endpoint(Arc<Agent>);

/// Runs a request to its end even if the client goes away. Stopping in the
/// middle would leave something half made.
async fn run_to_completion<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<Response<T>, Status> {
    match tokio::spawn(work).await {
        Ok(done) => Ok(Response::new(done?)),
        Err(panic) => Err(Status::internal(format!("the agent failed: {panic}"))),
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Service for Endpoint {
    async fn hello(&self, _: Request<HelloRequest>) -> Answer<HelloResponse> {
        Ok(Response::new(HelloResponse {
            protocol: husk_proto::agent::PROTOCOL,
            release: env!("CARGO_PKG_VERSION").into(),
        }))
    }

    async fn create_sandbox(&self, request: Request<CreateSandboxRequest>) -> Answer<CreateSandboxResponse> {
        run_to_completion(sandbox::create(self.0.clone(), request.into_inner())).await
    }

    async fn adjust_clock(&self, request: Request<AdjustClockRequest>) -> Answer<AdjustClockResponse> {
        Ok(Response::new(sandbox::adjust_clock(&self.0, &request.into_inner())?))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Answer<ShutdownResponse> {
        run_to_completion(sandbox::shutdown(self.0.clone())).await
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Answer<CreateContainerResponse> {
        run_to_completion(container::create(self.0.clone(), request.into_inner())).await
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Answer<StartContainerResponse> {
        run_to_completion(container::start(self.0.clone(), request.into_inner())).await
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Answer<RemoveContainerResponse> {
        run_to_completion(container::remove(self.0.clone(), request.into_inner())).await
    }

    async fn update_container(
        &self,
        request: Request<UpdateContainerRequest>,
    ) -> Answer<UpdateContainerResponse> {
        run_to_completion(container::update(self.0.clone(), request.into_inner())).await
    }

    async fn exec_process(&self, request: Request<ExecProcessRequest>) -> Answer<ExecProcessResponse> {
        run_to_completion(process::exec(self.0.clone(), request.into_inner())).await
    }

    async fn signal_process(&self, request: Request<SignalProcessRequest>) -> Answer<SignalProcessResponse> {
        Ok(Response::new(process::signal(&self.0, &request.into_inner())?))
    }

    async fn wait_process(&self, request: Request<WaitProcessRequest>) -> Answer<WaitProcessResponse> {
        Ok(Response::new(process::wait(&self.0, &request.into_inner()).await?))
    }

    async fn resize_terminal(
        &self,
        request: Request<ResizeTerminalRequest>,
    ) -> Answer<ResizeTerminalResponse> {
        Ok(Response::new(process::resize(&self.0, &request.into_inner())?))
    }

    async fn write_volume(&self, request: Request<WriteVolumeRequest>) -> Answer<WriteVolumeResponse> {
        run_to_completion(volume::write(self.0.clone(), request.into_inner())).await
    }

    async fn container_stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Answer<ContainerStatsResponse> {
        Ok(Response::new(stats::read(&self.0, request.into_inner()).await?))
    }
}
