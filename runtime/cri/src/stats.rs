//! Usage of containers: ContainerStats, ListContainerStats, StreamContainerStats. The
//! guest counts it.

use std::sync::Arc;

use futures::future::join_all;
use husk_pods::model::{ContainerRecord, Sandbox};
use husk_pods::ops::{ContainerUsage, usage};
use husk_pods::{Error, Node};
use husk_proto::cri::{
    self, ContainerStatsFilter, ContainerStatsRequest, ContainerStatsResponse, ListContainerStatsRequest,
    ListContainerStatsResponse,
};

use crate::sandboxes::has_labels;

pub(crate) async fn container_stats(
    node: &Arc<Node>,
    request: ContainerStatsRequest,
) -> Result<ContainerStatsResponse, Error> {
    let (sandbox, container) = node.registry.container(&request.container_id)?;
    let usage = usage(&sandbox, vec![container.clone()]).await;
    match usage.and_then(|mut usage| usage.containers.pop()) {
        Some(usage) => Ok(ContainerStatsResponse { stats: Some(to_cri(&usage, &sandbox)) }),
        None => Err(Error::WrongState(format!(
            "container `{}` is {} and has no figures",
            container.id,
            container.record().state.word()
        ))),
    }
}

pub(crate) async fn list_container_stats(
    node: &Arc<Node>,
    request: ListContainerStatsRequest,
) -> Result<ListContainerStatsResponse, Error> {
    let stats = of_containers(node, request.filter.unwrap_or_default()).await;
    Ok(ListContainerStatsResponse { stats })
}

/// The figures of all containers that the filter lets through.
pub(crate) async fn of_containers(
    node: &Arc<Node>,
    filter: ContainerStatsFilter,
) -> Vec<cri::ContainerStats> {
    let wanted = |record: &ContainerRecord| {
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
        let usage = usage(&sandbox, containers).await.unwrap_or_default();
        usage.containers.iter().map(|usage| to_cri(usage, &sandbox)).collect()
    });
    join_all(machines).await.into_iter().flatten().collect()
}

pub(crate) const fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

pub(crate) fn to_cri(usage: &ContainerUsage, sandbox: &Sandbox) -> cri::ContainerStats {
    let ContainerUsage { record, stat, nano_cores } = usage;
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
