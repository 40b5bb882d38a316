//! The RPC that reports the resource usage of containers and of the machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use husk_proto::agent::{ContainerStat, ContainerStatsRequest, ContainerStatsResponse};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

use super::{Agent, Error};
use crate::container::layer::{self, DiskUsage, Measured};
use crate::guest::{clock, machine};

/// The age up to which the size of a writable layer is used again: measuring
/// walks all files.
const DISK_USAGE_AGE: Duration = Duration::from_secs(10);

/// How long an answer waits for layers that are being measured. After that it
/// has the earlier values.
const MEASURE_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves `ContainerStats`.
pub async fn read(agent: &Agent, request: ContainerStatsRequest) -> Result<ContainerStatsResponse, Error> {
    let wanted = if request.container_ids.is_empty() {
        agent.containers.all()
    } else {
        request.container_ids.iter().map(|id| agent.containers.get(id)).collect::<Result<_, _>>()?
    };
    let mut containers = Vec::with_capacity(wanted.len());
    let deadline = Instant::now() + MEASURE_TIMEOUT;
    for container in wanted {
        let disk =
            disk_usage(&container.measured, container.bundle.upper(), &agent.measuring, deadline).await;
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

/// The size of the layer `upper`, now or when it was last measured.
async fn disk_usage(
    measured: &Arc<Measured>,
    upper: PathBuf,
    turn: &Arc<Mutex<()>>,
    deadline: Instant,
) -> DiskUsage {
    let mut news = measured.last.subscribe();
    let last = *news.borrow_and_update();
    if let Some((when, usage)) = last
        && when.elapsed() < DISK_USAGE_AGE
    {
        return usage;
    }
    if !measured.under_way.swap(true, Ordering::Relaxed) {
        // The measurement runs to its end, whoever waits for it: otherwise a
        // large layer would be measured again and again, and never have a size.
        tokio::spawn(measure(measured.clone(), upper, turn.clone()));
    }
    let now = match timeout_at(deadline, news.changed()).await {
        Ok(Ok(())) => *news.borrow(),
        Ok(Err(_)) | Err(_) => last,
    };
    now.map(|(_, usage)| usage).unwrap_or_default()
}

async fn measure(measured: Arc<Measured>, upper: PathBuf, turn: Arc<Mutex<()>>) {
    let _turn = turn.lock().await;
    let usage = tokio::task::spawn_blocking(move || layer::measure(&upper)).await.unwrap_or_default();
    measured.last.send_replace(Some((Instant::now(), usage)));
    measured.under_way.store(false, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_layer_that_takes_long_to_measure_holds_nothing_up_and_is_known_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "x".repeat(5000)).unwrap();
        let (measured, turn) = (Arc::<Measured>::default(), Arc::<Mutex<()>>::default());
        let soon = || Instant::now() + Duration::from_millis(50);
        let ask = || disk_usage(&measured, folder.path().into(), &turn, soon());
        // Another layer is being measured.
        let other = turn.lock().await;
        assert_eq!((ask().await, ask().await), (DiskUsage::default(), DiskUsage::default()));
        drop(other);
        measured.last.subscribe().wait_for(Option::is_some).await.unwrap();
        let usage = ask().await;
        assert_eq!((usage.inodes, usage.bytes >= 5000), (1, true));
    }
}
