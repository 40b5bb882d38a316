//! Every list that can be had as a stream is the same both ways.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use husk_agent_client::fake::Fake;
use husk_config::Config;
use husk_pods::Node;
use husk_pods::test_util::{pod_of, running};
use husk_proto::agent::{self, ContainerStat, InterfaceStat, MachineStat};
use husk_proto::cri::runtime_service_server::RuntimeService;
use husk_proto::cri::*;
use tonic::Request;

use crate::runtime_service::{Answer, Items, Runtime};

/// A node with three pods of one container each.
async fn runtime(folder: &std::path::Path) -> Runtime {
    let mut config =
        Config { state_dir: folder.join("state"), run_dir: folder.join("run"), ..Config::default() };
    config.streaming.address = "127.0.0.1:0".parse().unwrap();
    let node = Arc::new(Node::open(config).unwrap());
    for id in ["one", "two", "three"] {
        let (sandbox, container) = running(&node.sandboxes_dir(), id, node.events.clone()).await;
        let stat = ContainerStat {
            container_id: container.id.to_string(),
            time_unix_nanos: 5,
            cpu_usage_nanos: 6,
            ..Default::default()
        };
        let interface = InterfaceStat { name: "eth0".into(), rx_bytes: 7, ..Default::default() };
        let machine_stat = MachineStat { interfaces: vec![interface], ..Default::default() };
        let stats = agent::ContainerStatsResponse { containers: vec![stat], machine: Some(machine_stat) };
        let fake = Arc::new(Fake { stats: stats.into(), ..Fake::default() });
        let agent = fake.serve(sandbox.directory(), Duration::from_secs(20)).await;
        sandbox.set_running(Some(pod_of(agent)));
        node.registry.add_sandbox(sandbox.clone());
        node.registry.add_container(sandbox, container);
    }
    Runtime::new(node)
}

fn empty<T: Default>() -> Request<T> {
    Request::new(T::default())
}

/// The messages of a stream.
async fn all<T>(stream: Answer<Items<T>>) -> Vec<T> {
    stream.unwrap().into_inner().try_collect().await.unwrap()
}

#[tokio::test]
async fn streams_have_what_lists_have() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = runtime(folder.path()).await;

    let list = runtime.list_pod_sandbox(empty()).await.unwrap().into_inner().items;
    let stream = all(runtime.stream_pod_sandboxes(empty()).await).await;
    assert_eq!(stream.into_iter().flat_map(|message| message.pod_sandboxes).collect::<Vec<_>>(), list);
    assert_eq!(list.len(), 3);

    let list = runtime.list_containers(empty()).await.unwrap().into_inner().containers;
    let stream = all(runtime.stream_containers(empty()).await).await;
    assert_eq!(stream.into_iter().flat_map(|message| message.containers).collect::<Vec<_>>(), list);
    assert_eq!(list.len(), 3);
}

#[tokio::test]
async fn streams_have_the_figures_that_lists_have() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = runtime(folder.path()).await;

    let list = runtime.list_container_stats(empty()).await.unwrap().into_inner().stats;
    let stream = all(runtime.stream_container_stats(empty()).await).await;
    assert_eq!(stream.into_iter().flat_map(|message| message.container_stats).collect::<Vec<_>>(), list);
    assert_eq!(list.len(), 3);

    // Pods' own figures have the time at which they were asked for.
    let timeless = |stats: PodSandboxStats| {
        let linux = stats.linux.unwrap();
        let network = linux.network.unwrap().default_interface;
        (stats.attributes, network, linux.containers)
    };
    let list = runtime.list_pod_sandbox_stats(empty()).await.unwrap().into_inner().stats;
    let list: Vec<_> = list.into_iter().map(timeless).collect();
    let stream = all(runtime.stream_pod_sandbox_stats(empty()).await).await;
    let stream = stream.into_iter().flat_map(|message| message.pod_sandbox_stats);
    assert_eq!(stream.map(timeless).collect::<Vec<_>>(), list);
    assert_eq!(list.len(), 3);

    let timeless = |mut metrics: PodSandboxMetrics| {
        metrics.metrics.iter_mut().for_each(|metric| metric.timestamp = 0);
        metrics
    };
    let list = runtime.list_pod_sandbox_metrics(empty()).await.unwrap().into_inner().pod_metrics;
    let list: Vec<_> = list.into_iter().map(timeless).collect();
    let stream = all(runtime.stream_pod_sandbox_metrics(empty()).await).await;
    let stream = stream.into_iter().flat_map(|message| message.pod_sandbox_metrics);
    assert_eq!(stream.map(timeless).collect::<Vec<_>>(), list);
    assert_eq!(list.len(), 3);
}

#[tokio::test]
async fn streams_filter_as_lists_do() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = runtime(folder.path()).await;
    let filter = PodSandboxFilter { id: "t".into(), ..Default::default() };
    let request = StreamPodSandboxesRequest { filter: Some(filter) };
    let [message] = all(runtime.stream_pod_sandboxes(Request::new(request)).await).await.try_into().unwrap();
    assert_eq!(message.pod_sandboxes.len(), 2);
    let filter = ContainerStatsFilter { pod_sandbox_id: "one".into(), ..Default::default() };
    let request = StreamContainerStatsRequest { filter: Some(filter) };
    let [message] =
        all(runtime.stream_container_stats(Request::new(request)).await).await.try_into().unwrap();
    assert_eq!(message.container_stats.len(), 1);
}
