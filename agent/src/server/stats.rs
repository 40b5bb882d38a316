//! What containers and the machine use.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use husk_proto::agent::{ContainerStat, ContainerStatsRequest, ContainerStatsResponse};
use tokio::time::Instant;

use super::{Agent, Error};
use crate::container::Container;
use crate::layer::{self, DiskUsage};
use crate::{clock, machine};

/// How old a measure of a writable layer may be: it is a walk over all files.
const DISK_USAGE_AGE: Duration = Duration::from_secs(10);

/// `ContainerStats`.
pub async fn read(agent: &Agent, request: ContainerStatsRequest) -> Result<ContainerStatsResponse, Error> {
    let wanted = if request.container_ids.is_empty() {
        agent.containers.all()
    } else {
        request.container_ids.iter().map(|id| agent.containers.get(id)).collect::<Result<_, _>>()?
    };
    let mut containers = Vec::with_capacity(wanted.len());
    for container in wanted {
        let disk = disk_usage(&container).await;
        let usage = container.cgroup.usage();
        containers.push(ContainerStat {
            container_id: container.id.clone(),
            time_unix_nanos: clock::unix_nanos(),
            cpu_usage_nanos: usage.cpu_nanos,
            memory_usage_bytes: usage.memory,
            memory_working_set_bytes: usage.memory.saturating_sub(usage.inactive_file),
            memory_rss_bytes: usage.anonymous,
            memory_page_faults: usage.page_faults,
            memory_major_page_faults: usage.major_page_faults,
            swap_usage_bytes: usage.swap,
            writable_layer_bytes: disk.bytes,
            writable_layer_inodes: disk.inodes,
            pids: usage.pids,
            cpu_user_nanos: usage.cpu_user_nanos,
            cpu_system_nanos: usage.cpu_system_nanos,
            cpu_periods: usage.periods,
            cpu_throttled_periods: usage.throttled_periods,
            cpu_throttled_nanos: usage.throttled_nanos,
            memory_limit_bytes: usage.memory_limit,
            memory_peak_bytes: usage.memory_peak,
            memory_cache_bytes: usage.file,
            memory_mapped_file_bytes: usage.mapped_file,
            memory_kernel_bytes: usage.kernel,
            memory_active_file_bytes: usage.active_file,
            memory_inactive_file_bytes: usage.inactive_file,
            oom_kills: usage.oom_kills,
            pids_limit: usage.pids_limit,
            io_read_bytes: usage.io.read_bytes,
            io_write_bytes: usage.io.write_bytes,
            io_reads: usage.io.reads,
            io_writes: usage.io.writes,
            processes: usage.processes,
        });
    }
    Ok(ContainerStatsResponse { containers, machine: Some(machine::stat()) })
}

async fn disk_usage(container: &Arc<Container>) -> DiskUsage {
    let last = *container.measured.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((when, usage)) = last
        && when.elapsed() < DISK_USAGE_AGE
    {
        return usage;
    }
    let upper = container.bundle.upper();
    let usage = tokio::task::spawn_blocking(move || layer::measure(&upper)).await.unwrap_or_default();
    *container.measured.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), usage));
    usage
}
