//! The RuntimeService, RPC by RPC.
//!
//! An RPC that changes something runs to its end even when the client goes
//! away: half a pod helps nobody.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use husk_pods::{Error, Node, ops};
use husk_proto::cri::runtime_service_server::RuntimeService;
use husk_proto::cri::*;
use tonic::{Request, Response, Status};
use tracing::Instrument;

use crate::batches::in_batches;
use crate::{
    attach, container_events, containers, create_container, exec, exec_sync, metrics, node_info, pod_stats,
    run_pod_sandbox, sandboxes, stats, status, update_resources,
};

/// The RuntimeService of one node.
#[derive(Debug)]
pub struct Runtime {
    node: Arc<Node>,
}

impl Runtime {
    /// Serves the pods and containers of `node`.
    #[must_use]
    pub const fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

pub(crate) type Answer<T> = Result<Response<T>, Status>;
pub(crate) type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn answer<T>(result: Result<T, Error>) -> Answer<T> {
    result.map(Response::new).map_err(|error| status::of(&error))
}

/// Runs an RPC on a task of its own, which goes on when the client does not
/// wait for it.
async fn to_its_end<T: Send + 'static>(
    rpc: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Answer<T> {
    answer(
        tokio::spawn(rpc.in_current_span())
            .await
            .unwrap_or_else(|error| Err(Error::Broken(error.to_string()))),
    )
}

fn not_yet<T>(rpc: &str) -> Answer<T> {
    Err(Status::unimplemented(format!("{rpc} is not supported yet")))
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
        let id = request.into_inner().pod_sandbox_id;
        to_its_end(async move {
            ops::stop_sandbox(&node, &id).await?;
            Ok(StopPodSandboxResponse {})
        })
        .await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Answer<RemovePodSandboxResponse> {
        let node = self.node.clone();
        let id = request.into_inner().pod_sandbox_id;
        to_its_end(async move {
            ops::remove_sandbox(&node, &id).await?;
            Ok(RemovePodSandboxResponse {})
        })
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
        let id = request.into_inner().container_id;
        to_its_end(async move {
            ops::start_container(&node, &id).await?;
            Ok(StartContainerResponse {})
        })
        .await
    }

    async fn stop_container(&self, request: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        let node = self.node.clone();
        let StopContainerRequest { container_id, timeout } = request.into_inner();
        let grace = Duration::from_secs(u64::try_from(timeout).unwrap_or(0));
        to_its_end(async move {
            ops::stop_container(&node, &container_id, grace).await?;
            Ok(StopContainerResponse {})
        })
        .await
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Answer<RemoveContainerResponse> {
        let node = self.node.clone();
        let id = request.into_inner().container_id;
        to_its_end(async move {
            ops::remove_container(&node, &id).await?;
            Ok(RemoveContainerResponse {})
        })
        .await
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
        let reopened = ops::reopen_log(&self.node, &request.into_inner().container_id).await;
        answer(reopened.map(|()| ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        // This one ends with its client, and its command with it.
        answer(exec_sync::exec_sync(&self.node, request.into_inner()).await)
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ExecResponse> {
        answer(exec::exec(&self.node, request.into_inner()))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Answer<AttachResponse> {
        answer(attach::attach(&self.node, &request.into_inner()))
    }

    async fn port_forward(&self, request: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        // Which port, the client says for each connection.
        let url = ops::port_forward(&self.node, &request.into_inner().pod_sandbox_id);
        answer(url.map(|url| PortForwardResponse { url }))
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
        Ok(Response::new(node_info::status(&self.node, &request.into_inner()).await))
    }

    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        Ok(Response::new(node_info::runtime_config(&self.node)))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<PodSandboxStatsRequest>,
    ) -> Answer<PodSandboxStatsResponse> {
        answer(pod_stats::pod_sandbox_stats(&self.node, request.into_inner()).await)
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Answer<ListPodSandboxStatsResponse> {
        answer(pod_stats::list_pod_sandbox_stats(&self.node, request.into_inner()).await)
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Answer<ListMetricDescriptorsResponse> {
        Ok(Response::new(metrics::list_metric_descriptors()))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Answer<ListPodSandboxMetricsResponse> {
        let pod_metrics = metrics::pod_sandbox_metrics(&self.node).await;
        Ok(Response::new(ListPodSandboxMetricsResponse { pod_metrics }))
    }

    type StreamPodSandboxesStream = Items<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let filter = request.into_inner().filter;
        let all = sandboxes::list_pod_sandbox(&self.node, &ListPodSandboxRequest { filter });
        in_batches(all.map(|all| all.items), |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes })
    }

    type StreamContainersStream = Items<StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let filter = request.into_inner().filter;
        let all = containers::list_containers(&self.node, &ListContainersRequest { filter });
        in_batches(all.map(|all| all.containers), |containers| StreamContainersResponse { containers })
    }

    type StreamContainerStatsStream = Items<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let all = stats::of_containers(&self.node, filter).await;
        in_batches(Ok(all), |container_stats| StreamContainerStatsResponse { container_stats })
    }

    type StreamPodSandboxStatsStream = Items<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let all = pod_stats::of_sandboxes(&self.node, filter).await;
        in_batches(Ok(all), |pod_sandbox_stats| StreamPodSandboxStatsResponse { pod_sandbox_stats })
    }

    type StreamPodSandboxMetricsStream = Items<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let all = metrics::pod_sandbox_metrics(&self.node).await;
        in_batches(Ok(all), |pod_sandbox_metrics| StreamPodSandboxMetricsResponse { pod_sandbox_metrics })
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        let node = self.node.clone();
        to_its_end(async move { update_resources::of_container(&node, request.into_inner()).await }).await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        let node = self.node.clone();
        to_its_end(async move { update_resources::of_sandbox(&node, request.into_inner()).await }).await
    }

    type GetContainerEventsStream = Items<ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        Ok(Response::new(container_events::listen(&self.node)))
    }

    // The rest is not built yet.

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
}
