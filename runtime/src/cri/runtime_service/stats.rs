//! What containers use: ContainerStats, ListContainerStats,
//! StreamContainerStats. The guest counts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use husk_proto::agent::{self, ContainerStat, MachineStat};
use husk_proto::cri::{
    self, ContainerStatsFilter, ContainerStatsRequest, ContainerStatsResponse, ListContainerStatsRequest,
    ListContainerStatsResponse,
};

use super::sandboxes::has_labels;
use crate::container::{Container, Record, State};
use crate::cri::error::Error;
use crate::node::Node;
use crate::sandbox::Sandbox;

/// Most time that one machine may take before the others' figures are given
/// without its own.
const PER_MACHINE: Duration = Duration::from_secs(5);

/// What a pod's machine has counted.
#[derive(Debug, Default)]
pub(super) struct Figures {
    /// Of the containers that run.
    pub(super) containers: Vec<Figure>,
    /// Of the machine as a whole.
    pub(super) machine: MachineStat,
}

/// What a container has used.
#[derive(Debug)]
pub(super) struct Figure {
    /// The container.
    pub(super) record: Record,
    /// What was counted.
    pub(super) stat: ContainerStat,
    /// Processor time that it takes at present, nanoseconds per second.
    pub(super) nano_cores: Option<u64>,
}

pub(super) async fn container_stats(
    node: &Arc<Node>,
    request: ContainerStatsRequest,
) -> Result<ContainerStatsResponse, Error> {
    let (sandbox, container) = node.registry.container(&request.container_id)?;
    let figures = figures(&sandbox, vec![container.clone()]).await;
    match figures.and_then(|mut figures| figures.containers.pop()) {
        Some(figure) => Ok(ContainerStatsResponse { stats: Some(to_cri(&figure, &sandbox)) }),
        None => Err(Error::FailedPrecondition(format!(
            "container `{}` is {} and has no figures",
            container.id,
            container.state().word()
        ))),
    }
}

pub(super) async fn list_container_stats(
    node: &Arc<Node>,
    request: ListContainerStatsRequest,
) -> Result<ListContainerStatsResponse, Error> {
    let stats = of_containers(node, request.filter.unwrap_or_default()).await;
    Ok(ListContainerStatsResponse { stats })
}

/// The figures of all containers that the filter lets through.
pub(super) async fn of_containers(
    node: &Arc<Node>,
    filter: ContainerStatsFilter,
) -> Vec<cri::ContainerStats> {
    let wanted = |record: &Record| {
        record.id.as_str().starts_with(&filter.id)
            && record.sandbox_id.as_str().starts_with(&filter.pod_sandbox_id)
            && has_labels(&record.config.labels, &filter.label_selector)
    };
    let machines = node.registry.sandboxes().into_iter().map(|sandbox| async move {
        let containers = sandbox.containers().into_iter();
        let containers: Vec<_> = containers.filter(|container| wanted(&container.record())).collect();
        if containers.is_empty() {
            return Vec::new();
        }
        let figures = figures(&sandbox, containers).await.unwrap_or_default();
        figures.containers.iter().map(|figure| to_cri(figure, &sandbox)).collect()
    });
    join_all(machines).await.into_iter().flatten().collect()
}

/// Asks a pod's machine for the figures of those of `containers` that run.
/// `None` when it does not answer, or not in time.
pub(super) async fn figures(sandbox: &Sandbox, containers: Vec<Arc<Container>>) -> Option<Figures> {
    let running: Vec<_> =
        containers.into_iter().filter(|container| container.state() == State::Running).collect();
    let machine = sandbox.machine()?;
    // One container by its id. Several as all that there are: one of them may
    // be removed meanwhile, and the others' figures are still wanted.
    let container_ids = match running.as_slice() {
        [one] => vec![one.id.to_string()],
        _ => Vec::new(),
    };
    let request = agent::ContainerStatsRequest { container_ids };
    let asked = machine.agent.call("stats", async |mut agent| agent.container_stats(request).await);
    let answer = match tokio::time::timeout(PER_MACHINE, asked).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            tracing::warn!(sandbox = %sandbox.id, %error, "no figures");
            return None;
        }
        Err(_) => {
            tracing::warn!(sandbox = %sandbox.id, "no figures: the agent does not answer");
            return None;
        }
    };
    let read = Instant::now();
    let containers = running.into_iter().filter_map(|container| {
        let stats = &answer.containers;
        let stat = stats.iter().find(|stat| stat.container_id == container.id.as_str())?.clone();
        let nano_cores = container.cpu_rate.read(stat.cpu_usage_nanos, read);
        Some(Figure { record: container.record().clone(), stat, nano_cores })
    });
    Some(Figures { containers: containers.collect(), machine: answer.machine.unwrap_or_default() })
}

pub(super) const fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

pub(super) fn to_cri(figure: &Figure, sandbox: &Sandbox) -> cri::ContainerStats {
    let Figure { record, stat, nano_cores } = figure;
    let timestamp = stat.time_unix_nanos;
    // Without a limit there is no telling what is left.
    let available = stat.memory_limit_bytes.checked_sub(stat.memory_working_set_bytes);
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: record.id.to_string(),
            metadata: record.config.metadata.clone(),
            labels: record.config.labels.clone(),
            annotations: record.config.annotations.clone(),
        }),
        cpu: Some(cri::CpuUsage {
            timestamp,
            usage_core_nano_seconds: value(stat.cpu_usage_nanos),
            usage_nano_cores: nano_cores.and_then(value),
            psi: None,
        }),
        memory: Some(cri::MemoryUsage {
            timestamp,
            working_set_bytes: value(stat.memory_working_set_bytes),
            available_bytes: available.map(|value| cri::UInt64Value { value }),
            usage_bytes: value(stat.memory_usage_bytes),
            rss_bytes: value(stat.memory_rss_bytes),
            page_faults: value(stat.memory_page_faults),
            major_page_faults: value(stat.memory_major_page_faults),
            psi: None,
        }),
        writable_layer: Some(cri::FilesystemUsage {
            timestamp,
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: sandbox.directory().display().to_string() }),
            used_bytes: value(stat.writable_layer_bytes),
            inodes_used: value(stat.writable_layer_inodes),
        }),
        swap: Some(cri::SwapUsage {
            timestamp,
            swap_available_bytes: None,
            swap_usage_bytes: value(stat.swap_usage_bytes),
        }),
        io: None,
    }
}
