//! Usage of pods and containers, as their agents count it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_base::{blocking, now};
use husk_config::Kind;
use husk_proto::agent::{self, ContainerStat, MachineStat};
use husk_vm::{DiskBounds, disk_bounds};

use crate::model::{Container, ContainerRecord, Sandbox, State};

/// Most time that one pod's agent may take before the figures of the others are
/// given without its own.
const AGENT_LIMIT: Duration = Duration::from_secs(5);

/// Usage of a pod, as its agent has counted it.
#[derive(Debug, Default)]
pub struct Usage {
    /// The containers that run.
    pub containers: Vec<ContainerUsage>,
    /// The pod as a whole.
    pub machine: MachineStat,
}

/// Usage of a container.
#[derive(Debug)]
pub struct ContainerUsage {
    /// The record of the container.
    pub record: Arc<ContainerRecord>,
    /// The agent's numbers.
    pub stat: ContainerStat,
    /// Processor time that it takes at present, nanoseconds per second.
    pub nano_cores: Option<u64>,
}

/// Asks a pod's agent for the figures of those of `containers` that run.
/// `None` when it does not answer, or not in time.
pub async fn usage(sandbox: &Sandbox, containers: Vec<Arc<Container>>) -> Option<Usage> {
    let running: Vec<_> =
        containers.into_iter().filter(|container| container.record().state == State::Running).collect();
    let running_pod = sandbox.running()?;
    // One container by its id. Several as all that there are: one of them may
    // be removed meanwhile, and the others' figures are still wanted.
    let container_ids = match running.as_slice() {
        [one] => vec![one.id.to_string()],
        _ => Vec::new(),
    };
    let request = agent::ContainerStatsRequest { container_ids };
    let asked = running_pod.agent.call("stats", async |mut agent| agent.container_stats(request).await);
    let answer = match tokio::time::timeout(AGENT_LIMIT, asked).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            tracing::warn!(sandbox = %sandbox.id, %error, "failed to ask for the usage of a pod");
            return None;
        }
        Err(_) => {
            tracing::warn!(sandbox = %sandbox.id, "no usage of a pod: its agent did not answer in time");
            return None;
        }
    };
    let read = Instant::now();
    let disk = writable_disk(sandbox).await;
    let containers = running.into_iter().filter_map(|container| {
        let stats = &answer.containers;
        let mut stat = stats.iter().find(|stat| stat.container_id == container.id.as_str())?.clone();
        // No sooner than its start, and no later than now.
        stat.time_unix_nanos = stat.time_unix_nanos.max(container.record().started_at).min(now());
        if let Some(disk) = disk {
            stat.writable_layer_bytes = stat.writable_layer_bytes.min(disk.bytes);
            stat.writable_layer_inodes = stat.writable_layer_inodes.min(disk.inodes);
        }
        let nano_cores = container.cpu_rate.read(stat.cpu_usage_nanos, read);
        Some(ContainerUsage { record: container.record(), stat, nano_cores })
    });
    Some(Usage { containers: containers.collect(), machine: answer.machine.unwrap_or_default() })
}

/// The most that containers of a VM can have written, whatever their guest says. The
/// agent of a host pod is no guest.
async fn writable_disk(sandbox: &Sandbox) -> Option<DiskBounds> {
    let record = sandbox.record();
    if record.kind == Kind::Host {
        return None;
    }
    let memory = record.size.map(|size| u64::from(size.memory_mib) << 20);
    // A disk that cannot be looked at holds nothing that could be shown.
    let disk = sandbox.scratch();
    Some(blocking(move || disk_bounds(&disk, memory)).await.unwrap_or(DiskBounds { bytes: 0, inodes: 0 }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use husk_agent_client::fake::Fake;
    use husk_base::lock;

    use super::*;
    use crate::model::Events;
    use crate::test_util::{pod_of, running};

    #[tokio::test]
    async fn a_guest_cannot_claim_more_disk_than_its_pod_has_on_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let pod = pod_of(fake.serve(folder.path(), Duration::from_secs(20)).await);
        let (sandbox, container) = running(folder.path(), "p", Events::default()).await;
        sandbox.set_running(Some(pod));
        let disk = std::fs::File::create(sandbox.scratch()).unwrap();
        disk.set_len(1 << 30).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&disk, &[7; 300_000], 1 << 20).unwrap();
        let on_host = disk.metadata().unwrap().blocks() * 512;
        assert!((300_000..1 << 20).contains(&on_host));
        // The guest's memory holds what it has not written to its disk yet.
        let most = on_host + (256 << 20);
        for (said, shown) in [
            ((u64::MAX, u64::MAX, i64::MAX), (most, 65_536)),
            ((4096, 3, 0), (4096, 3)),
            ((3 << 20, 3, 0), (3 << 20, 3)),
        ] {
            let stat = ContainerStat {
                container_id: container.id.to_string(),
                writable_layer_bytes: said.0,
                writable_layer_inodes: said.1,
                time_unix_nanos: said.2,
                ..Default::default()
            };
            lock(&fake.stats).containers = vec![stat];
            let usage = usage(&sandbox, vec![container.clone()]).await.unwrap();
            let stat = &usage.containers[0].stat;
            assert_eq!((stat.writable_layer_bytes, stat.writable_layer_inodes), shown);
            assert!((2..=now()).contains(&stat.time_unix_nanos), "{}", stat.time_unix_nanos);
        }
    }
}
