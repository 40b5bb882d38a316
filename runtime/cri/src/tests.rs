//! Every list that can be had as a stream is the same both ways, and what is served is logged
//! with its ids.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::TryStreamExt;
use husk_agent_client::fake::Fake;
use husk_base::lock;
use husk_config::Config;
use husk_pods::Node;
use husk_pods::model::Exit;
use husk_pods::test_util::{pod_of, running};
use husk_proto::agent::{self, ContainerStat, InterfaceStat, MachineStat};
use husk_proto::cri::runtime_service_client::RuntimeServiceClient;
use husk_proto::cri::runtime_service_server::RuntimeService;
use husk_proto::cri::*;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Request;
use tonic::transport::Endpoint;
use tower::service_fn;

use crate::runtime_service::{Answer, Items, Runtime};

/// The service of [`node`].
async fn runtime(folder: &Path) -> Runtime {
    Runtime::new(node(folder).await)
}

/// A node with three pods of one container each.
async fn node(folder: &Path) -> Arc<Node> {
    let mut config =
        Config { state_dir: folder.join("state"), run_dir: folder.join("run"), ..Config::default() };
    config.socket = folder.join("huskd.sock");
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
    node
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

/// Lines that were logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// The first line with this text, or nothing.
    fn line(&self, text: &str) -> String {
        let log = String::from_utf8(lock(&self.0).clone()).unwrap();
        log.lines().find(|line| line.contains(text)).unwrap_or_default().to_owned()
    }
}

#[tokio::test]
async fn a_line_of_an_rpc_has_its_name_and_the_ids_that_it_is_about() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path()).await;
    let (log, socket) = (Log::default(), node.config.socket.clone());
    let writer = log.clone();
    let lines = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone());
    let _logging = tracing::subscriber::set_default(lines.finish());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(crate::serve(node.clone(), || {}, async move { drop(stopped.await) }));
    while log.line("serving CRI v1").is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let connect = service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://husk").connect_with_connector(connect).await.unwrap();
    let mut client = RuntimeServiceClient::new(channel);

    for (sandbox, container) in node.registry.containers() {
        sandbox.container_ended(&container, Exit::unknown("it has ended")).await;
    }
    // By the beginning of its id, as a person gives it.
    client.remove_container(RemoveContainerRequest { container_id: "c-of-o".into() }).await.unwrap();
    let line = log.line("container removed");
    assert!(line.contains("rpc=RemoveContainer sandbox=one container=c-of-one"), "{line}");
    client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: "two".into() }).await.unwrap();
    let line = log.line("pod removed");
    assert!(line.contains("rpc=RemovePodSandbox sandbox=two"), "{line}");

    drop(client);
    drop(stop);
    serving.await.unwrap().unwrap();
}
