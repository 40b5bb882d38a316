//! What containers use: ContainerStats, ListContainerStats,
//! StreamContainerStats. The guest counts.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use husk_proto::agent::{self, ContainerStat, MachineStat};
use husk_proto::cri::{
    self, ContainerStatsFilter, ContainerStatsRequest, ContainerStatsResponse, ListContainerStatsRequest,
    ListContainerStatsResponse,
};

use super::sandboxes::has_labels;
use crate::container::{Record, State};
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
    pub(super) containers: Vec<(Record, ContainerStat)>,
    /// Of the machine as a whole.
    pub(super) machine: MachineStat,
}

pub(super) async fn container_stats(
    node: &Arc<Node>,
    request: ContainerStatsRequest,
) -> Result<ContainerStatsResponse, Error> {
    let (sandbox, container) = node.registry.container(&request.container_id)?;
    let record = container.record().clone();
    let figures = figures(&sandbox, vec![record.clone()]).await;
    match figures.and_then(|mut figures| figures.containers.pop()) {
        Some((record, stat)) => Ok(ContainerStatsResponse { stats: Some(to_cri(&record, &stat, &sandbox)) }),
        None => Err(Error::FailedPrecondition(format!(
            "container `{}` is {} and has no figures",
            record.id,
            record.state.word()
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
        let records: Vec<_> = records(&sandbox).into_iter().filter(wanted).collect();
        if records.is_empty() {
            return Vec::new();
        }
        let figures = figures(&sandbox, records).await.unwrap_or_default();
        figures.containers.iter().map(|(record, stat)| to_cri(record, stat, &sandbox)).collect()
    });
    join_all(machines).await.into_iter().flatten().collect()
}

/// The records of a pod's containers.
pub(super) fn records(sandbox: &Sandbox) -> Vec<Record> {
    sandbox.containers().iter().map(|container| container.record().clone()).collect()
}

/// Asks a pod's machine for the figures of those of `records` that run. `None`
/// when it does not answer, or not in time.
pub(super) async fn figures(sandbox: &Sandbox, records: Vec<Record>) -> Option<Figures> {
    let running: Vec<_> = records.into_iter().filter(|record| record.state == State::Running).collect();
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
    let containers = running.into_iter().filter_map(|record| {
        let stat = answer.containers.iter().find(|stat| stat.container_id == record.id.as_str())?.clone();
        Some((record, stat))
    });
    Some(Figures { containers: containers.collect(), machine: answer.machine.unwrap_or_default() })
}

pub(super) const fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

pub(super) fn to_cri(record: &Record, stat: &ContainerStat, sandbox: &Sandbox) -> cri::ContainerStats {
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
            usage_nano_cores: None,
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
