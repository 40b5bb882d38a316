//! The RuntimeService, verb by verb.
//!
//! A verb that changes something runs to its end even when the client goes
//! away: half a pod helps nobody.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use husk_proto::cri::runtime_service_server::RuntimeService;
use husk_proto::cri::*;
use tonic::{Request, Response, Status};

use super::error::Error;
use crate::node::Node;

mod containers;
mod create_container;
mod exec_sync;
mod node_info;
pub mod remove_container;
mod remove_pod_sandbox;
mod reopen_container_log;
mod run_pod_sandbox;
mod sandboxes;
mod start_container;
mod stats;
mod stop_container;
mod stop_pod_sandbox;

/// The service.
#[derive(Debug)]
pub struct Runtime {
    node: Arc<Node>,
}

impl Runtime {
    /// Serves `node`.
    #[must_use]
    pub const fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn answer<T>(result: Result<T, Error>) -> Answer<T> {
    result.map(Response::new).map_err(Status::from)
}

/// Runs a verb on a task of its own, which goes on when the client does not
/// wait for it.
async fn to_its_end<T: Send + 'static>(
    verb: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Answer<T> {
    answer(tokio::spawn(verb).await.unwrap_or_else(|error| Err(Error::Internal(error.to_string()))))
}

fn not_yet<T>(verb: &str) -> Answer<T> {
    Err(Status::unimplemented(format!("{verb} is not supported yet")))
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        Ok(Response::new(node_info::version()))
    }

    async fn run_pod_sandbox(&self, request: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        let node = self.node.clone();
        to_its_end(async move { run_pod_sandbox::run_pod_sandbox(&node, request.into_inner()).await }).await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Answer<StopPodSandboxResponse> {
        let node = self.node.clone();
        to_its_end(async move { stop_pod_sandbox::stop_pod_sandbox(&node, request.into_inner()).await }).await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Answer<RemovePodSandboxResponse> {
        let node = self.node.clone();
        to_its_end(async move { remove_pod_sandbox::remove_pod_sandbox(&node, request.into_inner()).await })
            .await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Answer<PodSandboxStatusResponse> {
        answer(sandboxes::pod_sandbox_status(&self.node, &request.into_inner()))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Answer<ListPodSandboxResponse> {
        answer(sandboxes::list_pod_sandbox(&self.node, &request.into_inner()))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Answer<CreateContainerResponse> {
        let node = self.node.clone();
        to_its_end(async move { create_container::create_container(&node, request.into_inner()).await }).await
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Answer<StartContainerResponse> {
        let node = self.node.clone();
        to_its_end(async move { start_container::start_container(&node, request.into_inner()).await }).await
    }

    async fn stop_container(&self, request: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        let node = self.node.clone();
        to_its_end(async move { stop_container::stop_container(&node, request.into_inner()).await }).await
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Answer<RemoveContainerResponse> {
        let node = self.node.clone();
        to_its_end(async move { remove_container::remove_container(&node, request.into_inner()).await }).await
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Answer<ListContainersResponse> {
        answer(containers::list_containers(&self.node, &request.into_inner()))
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Answer<ContainerStatusResponse> {
        answer(containers::container_status(&self.node, &request.into_inner()))
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Answer<ReopenContainerLogResponse> {
        answer(reopen_container_log::reopen_container_log(&self.node, request.into_inner()).await)
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        let node = self.node.clone();
        to_its_end(async move { exec_sync::exec_sync(&node, request.into_inner()).await }).await
    }

    async fn container_stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Answer<ContainerStatsResponse> {
        answer(stats::container_stats(&self.node, request.into_inner()).await)
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Answer<ListContainerStatsResponse> {
        answer(stats::list_container_stats(&self.node, request.into_inner()).await)
    }

    async fn update_runtime_config(
        &self,
        request: Request<UpdateRuntimeConfigRequest>,
    ) -> Answer<UpdateRuntimeConfigResponse> {
        node_info::update_runtime_config(&request.into_inner());
        Ok(Response::new(UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Answer<StatusResponse> {
        Ok(Response::new(node_info::status(&self.node, &request.into_inner())))
    }

    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        Ok(Response::new(node_info::runtime_config()))
    }

    // What follows is not built yet.

    async fn update_container_resources(
        &self,
        _: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        not_yet("UpdateContainerResources")
    }

    async fn exec(&self, _: Request<ExecRequest>) -> Answer<ExecResponse> {
        not_yet("Exec")
    }

    async fn attach(&self, _: Request<AttachRequest>) -> Answer<AttachResponse> {
        not_yet("Attach")
    }

    async fn port_forward(&self, _: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        not_yet("PortForward")
    }

    async fn pod_sandbox_stats(&self, _: Request<PodSandboxStatsRequest>) -> Answer<PodSandboxStatsResponse> {
        not_yet("PodSandboxStats")
    }

    async fn list_pod_sandbox_stats(
        &self,
        _: Request<ListPodSandboxStatsRequest>,
    ) -> Answer<ListPodSandboxStatsResponse> {
        not_yet("ListPodSandboxStats")
    }

    async fn checkpoint_container(
        &self,
        _: Request<CheckpointContainerRequest>,
    ) -> Answer<CheckpointContainerResponse> {
        not_yet("CheckpointContainer")
    }

    async fn checkpoint_pod(&self, _: Request<CheckpointPodRequest>) -> Answer<CheckpointPodResponse> {
        not_yet("CheckpointPod")
    }

    async fn restore_pod(&self, _: Request<RestorePodRequest>) -> Answer<RestorePodResponse> {
        not_yet("RestorePod")
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Answer<ListMetricDescriptorsResponse> {
        not_yet("ListMetricDescriptors")
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Answer<ListPodSandboxMetricsResponse> {
        not_yet("ListPodSandboxMetrics")
    }

    async fn update_pod_sandbox_resources(
        &self,
        _: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        not_yet("UpdatePodSandboxResources")
    }

    type StreamPodSandboxesStream = Items<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        _: Request<StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        not_yet("StreamPodSandboxes")
    }

    type StreamContainersStream = Items<StreamContainersResponse>;

    async fn stream_containers(
        &self,
        _: Request<StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        not_yet("StreamContainers")
    }

    type StreamContainerStatsStream = Items<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        _: Request<StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        not_yet("StreamContainerStats")
    }

    type StreamPodSandboxStatsStream = Items<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        _: Request<StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        not_yet("StreamPodSandboxStats")
    }

    type GetContainerEventsStream = Items<ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        not_yet("GetContainerEvents")
    }

    type StreamPodSandboxMetricsStream = Items<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        not_yet("StreamPodSandboxMetrics")
    }
}
