//! Figures for monitoring, by the names that cAdvisor gave them:
//! ListMetricDescriptors, ListPodSandboxMetrics, StreamPodSandboxMetrics.
//!
//! One table says what there is; both the descriptions and the values come
//! from it.

use std::sync::Arc;

use futures::future::join_all;
use husk_base::{cgroup, now};
use husk_pods::Node;
use husk_pods::model::{ContainerRecord, Phase, Sandbox};
use husk_pods::ops::{ContainerUsage, usage};
use husk_proto::agent::{ContainerStat, InterfaceStat};
use husk_proto::cri::{
    ContainerMetrics, LinuxContainerResources, ListMetricDescriptorsResponse, Metric, MetricDescriptor,
    MetricType, PodSandboxMetrics,
};

use crate::stats::value;

/// Labels that every metric has.
const LABELS: [&str; 5] = ["pod", "namespace", "container", "id", "image"];

/// The counters of the pod's writable disk are under this name.
const DISK: &str = "scratch";

const NANOS: u64 = 1_000_000_000;

/// One metric: its name, and how its value is found in a `T`.
struct Family<T: 'static> {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    /// More labels than [`LABELS`], with their values; a value that is empty
    /// is the name of the thing itself, such as the interface's.
    labels: &'static [(&'static str, &'static str)],
    value: fn(&T) -> Option<u64>,
}

/// The figures and limits of one container.
struct Sample {
    stat: ContainerStat,
    resources: LinuxContainerResources,
    started_at: i64,
}

/// The cost of a pod's machine to its node.
struct Cost {
    vmm: Option<cgroup::Usage>,
    guest: husk_proto::agent::MachineStat,
}

const fn counter<T>(name: &'static str, help: &'static str, value: fn(&T) -> Option<u64>) -> Family<T> {
    Family { name, help, kind: MetricType::Counter, labels: &[], value }
}

const fn gauge<T>(name: &'static str, help: &'static str, value: fn(&T) -> Option<u64>) -> Family<T> {
    Family { name, help, kind: MetricType::Gauge, labels: &[], value }
}

const fn labelled<T>(family: Family<T>, labels: &'static [(&'static str, &'static str)]) -> Family<T> {
    Family { labels, ..family }
}

const ON_DISK: &[(&str, &str)] = &[("device", DISK)];

static CONTAINER: &[Family<Sample>] = &[
    counter("container_cpu_usage_seconds_total", "Processor time used, seconds.", |s: &Sample| {
        Some(s.stat.cpu_usage_nanos / NANOS)
    }),
    counter("container_cpu_user_seconds_total", "Processor time used by programs, seconds.", |s| {
        Some(s.stat.cpu_user_nanos / NANOS)
    }),
    counter("container_cpu_system_seconds_total", "Processor time used in the kernel, seconds.", |s| {
        Some(s.stat.cpu_system_nanos / NANOS)
    }),
    counter(
        "container_cpu_cfs_periods_total",
        "Periods of the processor time limit that have passed.",
        |s| Some(s.stat.cpu_periods),
    ),
    counter("container_cpu_cfs_throttled_periods_total", "Periods in which the limit was reached.", |s| {
        Some(s.stat.cpu_throttled_periods)
    }),
    counter("container_cpu_cfs_throttled_seconds_total", "Time spent waiting at the limit, seconds.", |s| {
        Some(s.stat.cpu_throttled_nanos / NANOS)
    }),
    gauge("container_memory_usage_bytes", "Memory in use, the file cache included.", |s| {
        Some(s.stat.memory_usage_bytes)
    }),
    gauge("container_memory_working_set_bytes", "Memory in use that is not easily taken back.", |s| {
        Some(s.stat.memory_working_set_bytes)
    }),
    gauge("container_memory_max_usage_bytes", "Most memory that was in use at a time.", |s| {
        Some(s.stat.memory_peak_bytes)
    }),
    gauge("container_memory_rss", "Memory not backed by files.", |s| Some(s.stat.memory_rss_bytes)),
    gauge("container_memory_cache", "File cache.", |s| Some(s.stat.memory_cache_bytes)),
    gauge("container_memory_kernel_usage", "Kernel memory.", |s| Some(s.stat.memory_kernel_bytes)),
    gauge("container_memory_mapped_file", "Mapped files.", |s| Some(s.stat.memory_mapped_file_bytes)),
    gauge("container_memory_swap", "Swap in use.", |s| Some(s.stat.swap_usage_bytes)),
    gauge("container_memory_total_active_file_bytes", "File cache in frequent use.", |s| {
        Some(s.stat.memory_active_file_bytes)
    }),
    gauge("container_memory_total_inactive_file_bytes", "File cache that is taken back first.", |s| {
        Some(s.stat.memory_inactive_file_bytes)
    }),
    labelled(
        counter("container_memory_failures_total", "Page faults, by kind.", |s| {
            Some(s.stat.memory_page_faults)
        }),
        &[("failure_type", "pgfault"), ("scope", "container")],
    ),
    labelled(
        counter("container_memory_failures_total", "Page faults, by kind.", |s| {
            Some(s.stat.memory_major_page_faults)
        }),
        &[("failure_type", "pgmajfault"), ("scope", "container")],
    ),
    counter("container_oom_events_total", "Processes killed for want of memory.", |s| Some(s.stat.oom_kills)),
    labelled(
        gauge("container_fs_usage_bytes", "Bytes in the writable layer.", |s| {
            Some(s.stat.writable_layer_bytes)
        }),
        ON_DISK,
    ),
    labelled(
        counter("container_fs_reads_bytes_total", "Bytes read from disks.", |s| Some(s.stat.io_read_bytes)),
        ON_DISK,
    ),
    labelled(counter("container_fs_reads_total", "Reads from disks.", |s| Some(s.stat.io_reads)), ON_DISK),
    labelled(
        counter("container_fs_writes_bytes_total", "Bytes written to disks.", |s| {
            Some(s.stat.io_write_bytes)
        }),
        ON_DISK,
    ),
    labelled(counter("container_fs_writes_total", "Writes to disks.", |s| Some(s.stat.io_writes)), ON_DISK),
    gauge("container_processes", "Processes.", |s| Some(s.stat.processes)),
    gauge("container_threads", "Threads.", |s| Some(s.stat.pids)),
    gauge("container_threads_max", "Most threads that are allowed, 0 for any number.", |s| {
        Some(s.stat.pids_limit)
    }),
    gauge("container_last_seen", "When these figures are from, seconds since 1970.", |s| {
        seconds(s.stat.time_unix_nanos)
    }),
    gauge("container_start_time_seconds", "When the container started, seconds since 1970.", |s| {
        seconds(s.started_at)
    }),
    gauge("container_spec_cpu_period", "Period of the processor time limit, microseconds.", |s| {
        positive(s.resources.cpu_period)
    }),
    gauge("container_spec_cpu_quota", "Processor time limit per period, microseconds.", |s| {
        positive(s.resources.cpu_quota)
    }),
    gauge("container_spec_cpu_shares", "Share of processor time.", |s| positive(s.resources.cpu_shares)),
    gauge("container_spec_memory_limit_bytes", "Memory limit, 0 for none.", |s| {
        Some(s.stat.memory_limit_bytes)
    }),
];

/// A pod's own; the label `interface` is the interface's name.
static INTERFACE: &[Family<InterfaceStat>] = &[
    labelled(
        counter("container_network_receive_bytes_total", "Bytes received.", |i: &InterfaceStat| {
            Some(i.rx_bytes)
        }),
        OF_INTERFACE,
    ),
    labelled(
        counter("container_network_receive_packets_total", "Packets received.", |i| Some(i.rx_packets)),
        OF_INTERFACE,
    ),
    labelled(
        counter("container_network_receive_packets_dropped_total", "Packets dropped on receipt.", |i| {
            Some(i.rx_dropped)
        }),
        OF_INTERFACE,
    ),
    labelled(
        counter("container_network_receive_errors_total", "Errors on receipt.", |i| Some(i.rx_errors)),
        OF_INTERFACE,
    ),
    labelled(
        counter("container_network_transmit_bytes_total", "Bytes sent.", |i| Some(i.tx_bytes)),
        OF_INTERFACE,
    ),
    labelled(
        counter("container_network_transmit_packets_total", "Packets sent.", |i| Some(i.tx_packets)),
        OF_INTERFACE,
    ),
    labelled(
        counter("container_network_transmit_packets_dropped_total", "Packets dropped on sending.", |i| {
            Some(i.tx_dropped)
        }),
        OF_INTERFACE,
    ),
    labelled(
        counter("container_network_transmit_errors_total", "Errors on sending.", |i| Some(i.tx_errors)),
        OF_INTERFACE,
    ),
];

const OF_INTERFACE: &[(&str, &str)] = &[("interface", "")];

/// The metrics of the virtual machine, beside those of its containers.
static COST: &[Family<Cost>] = &[
    counter("husk_vmm_cpu_usage_seconds_total", "Processor time of the pod's VMM, seconds.", |c: &Cost| {
        c.vmm.map(|vmm| vmm.cpu_nanos / NANOS)
    }),
    gauge("husk_vmm_memory_usage_bytes", "Host memory of the pod's VMM, the guest's included.", |c| {
        c.vmm?.memory.map(|memory| memory.current)
    }),
    gauge("husk_guest_memory_total_bytes", "Memory of the guest.", |c| Some(c.guest.memory_total_bytes)),
    gauge("husk_guest_memory_available_bytes", "Memory that the guest can still hand out.", |c| {
        Some(c.guest.memory_available_bytes)
    }),
    gauge("husk_guest_agent_rss_bytes", "Memory of the agent in the guest.", |c| {
        Some(c.guest.agent_rss_bytes)
    }),
];

fn seconds(nanos: i64) -> Option<u64> {
    u64::try_from(nanos).ok().map(|nanos| nanos / NANOS)
}

fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

pub(crate) fn list_metric_descriptors() -> ListMetricDescriptorsResponse {
    let mut descriptors = Vec::<MetricDescriptor>::new();
    let all =
        CONTAINER.iter().map(describe).chain(INTERFACE.iter().map(describe)).chain(COST.iter().map(describe));
    for descriptor in all {
        // A metric with several values for a label has several rows.
        if descriptors.last().is_none_or(|last| last.name != descriptor.name) {
            descriptors.push(descriptor);
        }
    }
    ListMetricDescriptorsResponse { descriptors }
}

fn describe<T>(family: &Family<T>) -> MetricDescriptor {
    let labels = LABELS.iter().copied().chain(family.labels.iter().map(|(key, _)| *key));
    MetricDescriptor {
        name: family.name.into(),
        help: family.help.into(),
        label_keys: labels.map(str::to_owned).collect(),
    }
}

/// The figures of all pods that run.
pub(crate) async fn pod_sandbox_metrics(node: &Arc<Node>) -> Vec<PodSandboxMetrics> {
    let sandboxes = node.registry.sandboxes();
    let ready = sandboxes.iter().filter(|sandbox| sandbox.record().phase == Phase::Ready);
    join_all(ready.map(|sandbox| of_sandbox(sandbox))).await.into_iter().flatten().collect()
}

async fn of_sandbox(sandbox: &Sandbox) -> Option<PodSandboxMetrics> {
    let usage = usage(sandbox, sandbox.containers()).await?;
    let record = sandbox.record();
    let pod = record.config.metadata.clone().unwrap_or_default();
    let timestamp = now();
    let own = [pod.name.as_str(), &pod.namespace, "", record.id.as_str(), ""];
    let cost = Cost { vmm: record.cgroup.as_deref().and_then(cgroup::usage), guest: usage.machine };
    let mut metrics = values(COST, &cost, &own, "", timestamp);
    for interface in &cost.guest.interfaces {
        metrics.extend(values(INTERFACE, interface, &own, &interface.name, timestamp));
    }
    let container_metrics = usage.containers.into_iter().map(|ContainerUsage { record, stat, .. }| {
        let labels = container_labels(&pod.name, &pod.namespace, &record);
        let id = record.id.to_string();
        let timestamp = stat.time_unix_nanos;
        let resources =
            record.config.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
        let sample = Sample { stat, resources, started_at: record.started_at };
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        ContainerMetrics { container_id: id, metrics: values(CONTAINER, &sample, &labels, "", timestamp) }
    });
    Some(PodSandboxMetrics {
        pod_sandbox_id: record.id.to_string(),
        container_metrics: container_metrics.collect(),
        metrics,
    })
}

fn container_labels(pod: &str, namespace: &str, record: &ContainerRecord) -> [String; 5] {
    let name = record.config.metadata.as_ref().map(|metadata| metadata.name.clone()).unwrap_or_default();
    let image = record.config.image.clone().unwrap_or_default();
    let image = if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image };
    [pod.to_owned(), namespace.to_owned(), name, record.id.to_string(), image]
}

fn values<T>(families: &[Family<T>], of: &T, labels: &[&str], name: &str, timestamp: i64) -> Vec<Metric> {
    let metric = |family: &Family<T>| {
        let more = family.labels.iter().map(|(_, value)| if value.is_empty() { name } else { value });
        Some(Metric {
            name: family.name.into(),
            timestamp,
            metric_type: family.kind.into(),
            label_values: labels.iter().copied().chain(more).map(str::to_owned).collect(),
            value: value((family.value)(of)?),
        })
    };
    families.iter().filter_map(metric).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn every_value_has_a_description_with_as_many_labels() {
        let described: HashMap<String, usize> = list_metric_descriptors()
            .descriptors
            .into_iter()
            .map(|descriptor| (descriptor.name, descriptor.label_keys.len()))
            .collect();
        let sample = Sample {
            stat: ContainerStat { cpu_usage_nanos: 2_500_000_000, ..Default::default() },
            resources: LinuxContainerResources {
                cpu_shares: 2,
                cpu_period: 1,
                cpu_quota: 3,
                ..Default::default()
            },
            started_at: 5,
        };
        let interface = InterfaceStat { name: "eth0".into(), rx_bytes: 7, ..Default::default() };
        let cost = Cost { vmm: Some(cgroup::Usage::default()), guest: Default::default() };
        let labels = ["p", "n", "c", "i", "m"];
        let all: Vec<Metric> = values(CONTAINER, &sample, &labels, "", 1)
            .into_iter()
            .chain(values(INTERFACE, &interface, &labels, "eth0", 1))
            .chain(values(COST, &cost, &labels, "", 1))
            .collect();
        for metric in &all {
            assert_eq!(described.get(&metric.name), Some(&metric.label_values.len()), "{}", metric.name);
        }
        let of = |name: &str| all.iter().find(|metric| metric.name == name).unwrap();
        assert_eq!(of("container_cpu_usage_seconds_total").value.unwrap().value, 2);
        assert_eq!(of("container_spec_cpu_quota").value.unwrap().value, 3);
        assert_eq!(of("container_network_receive_bytes_total").label_values.last().unwrap(), "eth0");
    }

    #[test]
    fn a_name_is_described_once() {
        let mut names: Vec<_> =
            list_metric_descriptors().descriptors.into_iter().map(|descriptor| descriptor.name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn the_manual_has_every_metric_with_its_meaning() {
        let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let pages = here.ancestors().map(|folder| folder.join("docs/operating/metrics.md"));
        let page = std::fs::read_to_string(pages.into_iter().find(|page| page.is_file()).unwrap()).unwrap();
        let rows = page.lines().filter(|line| line.starts_with("| `"));
        let told: std::collections::BTreeSet<_> = rows
            .filter_map(|row| {
                let mut cells = row.split(" | ").map(|cell| cell.trim_matches(['|', '`', ' ']));
                Some((cells.next()?.to_owned(), cells.nth(1)?.to_owned()))
            })
            .collect();
        let descriptors = list_metric_descriptors().descriptors.into_iter();
        let known = descriptors.map(|one| (one.name, one.help.trim_end_matches('.').to_owned())).collect();
        assert_eq!(told, known, "docs/operating/metrics.md, then the code");
    }
}
