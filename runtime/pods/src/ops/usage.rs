//! Usage of pods and containers, as their agents count it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_proto::agent::{self, ContainerStat, MachineStat};

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
    let containers = running.into_iter().filter_map(|container| {
        let stats = &answer.containers;
        let stat = stats.iter().find(|stat| stat.container_id == container.id.as_str())?.clone();
        let nano_cores = container.cpu_rate.read(stat.cpu_usage_nanos, read);
        Some(ContainerUsage { record: container.record(), stat, nano_cores })
    });
    Some(Usage { containers: containers.collect(), machine: answer.machine.unwrap_or_default() })
}
