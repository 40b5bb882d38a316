//! Usage of pods: PodSandboxStats, ListPodSandboxStats, StreamPodSandboxStats.
//!
//! Processor and memory are what the pod costs its node: the control group of
//! its VMM, in which the machine's own kernel and devices count too. Network
//! and processes are counted by the guest.

use std::sync::Arc;
use std::time::Instant;

use futures::future::join_all;
use husk_base::{cgroup, now};
use husk_pods::model::cpu_rate::CpuRate;
use husk_pods::model::{Phase, Sandbox};
use husk_pods::ops::{Usage, usage};
use husk_pods::{Error, Node};
use husk_proto::agent::{InterfaceStat, MachineStat};
use husk_proto::cri::{
    self, ListPodSandboxStatsRequest, ListPodSandboxStatsResponse, PodSandboxStatsFilter,
    PodSandboxStatsRequest, PodSandboxStatsResponse,
};

use crate::sandboxes::has_labels;
use crate::stats::{to_cri, value};

pub(crate) async fn pod_sandbox_stats(
    node: &Arc<Node>,
    request: PodSandboxStatsRequest,
) -> Result<PodSandboxStatsResponse, Error> {
    let sandbox = node.registry.sandbox(&request.pod_sandbox_id)?;
    match of_sandbox(&sandbox).await {
        Some(stats) => Ok(PodSandboxStatsResponse { stats: Some(stats) }),
        None => Err(Error::WrongState(format!(
            "sandbox `{}` has no figures: its machine does not run, or does not answer",
            sandbox.id
        ))),
    }
}

pub(crate) async fn list_pod_sandbox_stats(
    node: &Arc<Node>,
    request: ListPodSandboxStatsRequest,
) -> Result<ListPodSandboxStatsResponse, Error> {
    Ok(ListPodSandboxStatsResponse { stats: of_sandboxes(node, request.filter.unwrap_or_default()).await })
}

/// The figures of all pods that run and that the filter lets through.
pub(crate) async fn of_sandboxes(
    node: &Arc<Node>,
    filter: PodSandboxStatsFilter,
) -> Vec<cri::PodSandboxStats> {
    let wanted = |sandbox: &Arc<Sandbox>| {
        let record = sandbox.record();
        record.id.as_str().starts_with(&filter.id)
            && record.phase == Phase::Ready
            && has_labels(&record.config.labels, &filter.label_selector)
    };
    let sandboxes: Vec<_> = node.registry.sandboxes().into_iter().filter(wanted).collect();
    join_all(sandboxes.iter().map(|sandbox| of_sandbox(sandbox))).await.into_iter().flatten().collect()
}

async fn of_sandbox(sandbox: &Sandbox) -> Option<cri::PodSandboxStats> {
    let usage = usage(sandbox, sandbox.containers()).await?;
    let record = sandbox.record();
    let timestamp = now();
    let cost = record.cgroup.as_deref().and_then(cgroup::usage);
    Some(cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: record.id.to_string(),
            metadata: record.config.metadata.clone(),
            labels: record.config.labels.clone(),
            annotations: record.config.annotations.clone(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: Some(cpu(timestamp, cost.as_ref(), &usage.machine, &sandbox.cpu_rate)),
            memory: Some(memory(timestamp, cost.as_ref(), &usage.machine)),
            network: Some(network(timestamp, &usage.machine)),
            process: Some(cri::ProcessUsage { timestamp, process_count: value(processes(&usage)) }),
            containers: usage.containers.iter().map(|usage| to_cri(usage, sandbox)).collect(),
            io: None,
        }),
        windows: None,
    })
}

/// A host without cgroup v2 has nothing to say; the guest then has.
fn cpu(timestamp: i64, cost: Option<&cgroup::Usage>, machine: &MachineStat, rate: &CpuRate) -> cri::CpuUsage {
    let nanos = cost.map_or(machine.cpu_usage_nanos, |cost| cost.cpu_nanos);
    let nano_cores = rate.read(nanos, Instant::now());
    cri::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(nanos),
        usage_nano_cores: nano_cores.and_then(value),
        psi: None,
    }
}

fn memory(timestamp: i64, cost: Option<&cgroup::Usage>, machine: &MachineStat) -> cri::MemoryUsage {
    let used = machine.memory_total_bytes.saturating_sub(machine.memory_available_bytes);
    let cost = cost.and_then(|cost| cost.memory.as_ref());
    cri::MemoryUsage {
        timestamp,
        working_set_bytes: value(cost.map_or(used, |cost| cost.current.saturating_sub(cost.inactive_file))),
        // The guest can still hand out as much, whatever the host has.
        available_bytes: value(machine.memory_available_bytes),
        usage_bytes: value(cost.map_or(used, |cost| cost.current)),
        rss_bytes: cost.and_then(|cost| value(cost.anonymous)),
        page_faults: cost.and_then(|cost| value(cost.page_faults)),
        major_page_faults: cost.and_then(|cost| value(cost.major_page_faults)),
        psi: None,
    }
}

fn network(timestamp: i64, machine: &MachineStat) -> cri::NetworkUsage {
    let mut interfaces: Vec<_> = machine.interfaces.iter().map(interface).collect();
    let default = interfaces.iter().position(|interface| interface.name == "eth0");
    cri::NetworkUsage {
        timestamp,
        default_interface: default.map(|index| interfaces.remove(index)),
        interfaces,
    }
}

fn interface(stat: &InterfaceStat) -> cri::NetworkInterfaceUsage {
    cri::NetworkInterfaceUsage {
        name: stat.name.clone(),
        rx_bytes: value(stat.rx_bytes),
        rx_errors: value(stat.rx_errors),
        tx_bytes: value(stat.tx_bytes),
        tx_errors: value(stat.tx_errors),
    }
}

fn processes(usage: &Usage) -> u64 {
    usage.containers.iter().fold(0u64, |sum, container| sum.saturating_add(container.stat.processes))
}
