//! What containers use: ContainerStats, ListContainerStats. The guest counts.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use husk_proto::agent::{self, ContainerStat};
use husk_proto::cri::{
    self, ContainerStatsRequest, ContainerStatsResponse, ListContainerStatsRequest,
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

pub(super) async fn container_stats(
    node: &Arc<Node>,
    request: ContainerStatsRequest,
) -> Result<ContainerStatsResponse, Error> {
    let (sandbox, container) = node.registry.container(&request.container_id)?;
    let record = container.record().clone();
    let stats = match of_sandbox(&sandbox, vec![record.clone()]).await.pop() {
        Some(stats) => stats,
        None => {
            return Err(Error::FailedPrecondition(format!(
                "container `{}` is {} and has no figures",
                record.id,
                record.state.word()
            )));
        }
    };
    Ok(ContainerStatsResponse { stats: Some(stats) })
}

pub(super) async fn list_container_stats(
    node: &Arc<Node>,
    request: ListContainerStatsRequest,
) -> Result<ListContainerStatsResponse, Error> {
    let filter = request.filter.unwrap_or_default();
    let wanted = |record: &Record| {
        record.id.as_str().starts_with(&filter.id)
            && record.sandbox_id.as_str().starts_with(&filter.pod_sandbox_id)
            && has_labels(&record.config.labels, &filter.label_selector)
    };
    let machines = node.registry.sandboxes().into_iter().map(|sandbox| async move {
        let records =
            sandbox.containers().iter().map(|container| container.record().clone()).filter(wanted).collect();
        match tokio::time::timeout(PER_MACHINE, of_sandbox(&sandbox, records)).await {
            Ok(stats) => stats,
            Err(_) => {
                tracing::warn!(sandbox = %sandbox.id, "no figures: the agent does not answer");
                Vec::new()
            }
        }
    });
    let stats = join_all(machines).await.into_iter().flatten().collect();
    Ok(ListContainerStatsResponse { stats })
}

/// The figures of those containers of a sandbox that run.
async fn of_sandbox(sandbox: &Sandbox, records: Vec<Record>) -> Vec<cri::ContainerStats> {
    let running: Vec<_> = records.into_iter().filter(|record| record.state == State::Running).collect();
    let Some(machine) = sandbox.machine().filter(|_| !running.is_empty()) else { return Vec::new() };
    let request = agent::ContainerStatsRequest {
        container_ids: running.iter().map(|record| record.id.to_string()).collect(),
    };
    match machine.agent.call("stats", async |mut agent| agent.container_stats(request).await).await {
        Ok(answer) => running
            .iter()
            .filter_map(|record| {
                let found = answer.containers.iter().find(|stat| stat.container_id == record.id.as_str())?;
                Some(to_cri(record, found, sandbox))
            })
            .collect(),
        Err(error) => {
            tracing::warn!(sandbox = %sandbox.id, %error, "no figures");
            Vec::new()
        }
    }
}

fn to_cri(record: &Record, stat: &ContainerStat, sandbox: &Sandbox) -> cri::ContainerStats {
    let value = |value| Some(cri::UInt64Value { value });
    let timestamp = stat.time_unix_nanos;
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
            available_bytes: None,
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
