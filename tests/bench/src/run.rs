//! Measures one runtime, from the first pod to the last.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;

use crate::agent;
use crate::cri::{Client, Step, Target, Times};
use crate::memory::{self, Memory, Split};
use crate::processes;
use crate::statistics::Spread;

/// How long a pod is left alone before it counts as idle. Meanwhile it returns
/// pages that it no longer needs to the host.
const SETTLE: Duration = Duration::from_secs(10);

/// The work for each runtime.
pub struct Plan {
    pub image: String,
    pub pods: u16,
    pub timeout: Duration,
    /// huskd's `run_dir`, see [`agent::vsock_of`].
    pub run_dir: PathBuf,
}

/// The results.
#[derive(Debug, Serialize)]
pub struct Measurement {
    pub name: String,
    pub version: String,
    pub handler: String,
    pub pods: u16,
    pub pull_ms: f64,
    pub one_by_one: Steps,
    pub at_once: Steps,
    pub memory: PodMemory,
}

/// Times in milliseconds.
#[derive(Debug, Serialize)]
pub struct Steps {
    pub steps: BTreeMap<Step, Spread>,
    /// The first three steps of a pod together.
    pub to_running: Spread,
    /// The other four steps together.
    pub to_gone: Spread,
    /// From the first request until all pods run.
    pub all_running: f64,
}

/// Memory in bytes.
#[derive(Debug, Serialize)]
pub struct PodMemory {
    /// The daemon, before its first pod and after its last.
    pub daemon_before: Memory,
    pub daemon_after: Memory,
    /// One idle pod.
    pub one: PodCost,
    /// The mean of `pods` idle pods.
    pub each_of_many: PodCost,
    /// By how much each pod lowered the memory that the host has available.
    pub available_each_of_many: i64,
}

/// The memory that one pod holds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PodCost {
    /// The process that holds the machine, without the guest's memory.
    pub vmm: Option<Memory>,
    /// The guest's memory.
    pub guest: Option<Memory>,
    /// All of its processes, with all of their memory.
    pub whole: Memory,
    /// Resident memory of the agent, which is part of the guest's.
    pub agent_resident: Option<u64>,
    /// Names of the processes.
    pub processes: Vec<String>,
}

/// Does all of the work. Pods that were started are removed, also after a failure.
pub async fn measure(target: Target, plan: &Plan) -> anyhow::Result<Measurement> {
    let mut client = Client::connect(&target, plan.timeout).await?;
    let version = client.version().await?;
    eprintln!("{}: {version}, handler `{}`", target.name, target.handler);
    let pull = client.pull(&plan.image).await?;

    // Page cache, file system blobs, bridges: what only the first pod pays for.
    let warm = client.start_pod("warm", &plan.image).await?;
    let checked = client.check_running(&warm).await;
    client.end_pod(warm).await?;
    checked?;
    let daemon_before = daemon(&target)?;

    let one_by_one = one_by_one(&mut client, plan).await?;
    let pod = client.start_pod("idle", &plan.image).await?;
    tokio::time::sleep(SETTLE).await;
    let one = cost(&plan.run_dir, &pod.sandbox).await;
    client.end_pod(pod).await?;

    let before = memory::available().context("read /proc/meminfo")?;
    let (at_once, each_of_many, available) = at_once(&client, plan).await?;
    Ok(Measurement {
        name: target.name.clone(),
        version,
        handler: target.handler.clone(),
        pods: plan.pods,
        pull_ms: milliseconds(pull),
        one_by_one,
        at_once,
        memory: PodMemory {
            daemon_before,
            daemon_after: daemon(&target)?,
            one: one?,
            each_of_many,
            available_each_of_many: (before.cast_signed() - available.cast_signed()) / i64::from(plan.pods),
        },
    })
}

async fn one_by_one(client: &mut Client, plan: &Plan) -> anyhow::Result<Steps> {
    let mut all = Vec::new();
    let mut running = Duration::ZERO;
    for number in 1..=plan.pods {
        let pod = client.start_pod(&format!("one-{number}"), &plan.image).await?;
        running += pod.times.values().sum::<Duration>();
        all.push(client.end_pod(pod).await?);
        eprint!(".");
    }
    eprintln!(" one by one");
    summary(&all, running)
}

async fn at_once(client: &Client, plan: &Plan) -> anyhow::Result<(Steps, PodCost, u64)> {
    let names: Vec<_> = (1..=plan.pods).map(|number| format!("many-{number}")).collect();
    let started = Instant::now();
    let pods = client.start_pods(&names, &plan.image).await?;
    let running = started.elapsed();
    tokio::time::sleep(SETTLE).await;
    let mut costs = Vec::new();
    for pod in &pods {
        costs.push(cost(&plan.run_dir, &pod.sandbox).await);
    }
    let available = memory::available();
    let times = client.end_pods(pods).await?;
    eprintln!(". at once");
    let costs = costs.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    Ok((summary(&times, running)?, mean(&costs), available.context("read /proc/meminfo")?))
}

fn summary(all: &[Times], running: Duration) -> anyhow::Result<Steps> {
    let spread = |steps: &[Step]| {
        let sums = all.iter().map(|times| {
            steps.iter().filter_map(|step| times.get(step)).map(|time| milliseconds(*time)).sum::<f64>()
        });
        Spread::of(sums).context("no pod was measured")
    };
    let mut steps = BTreeMap::new();
    for step in Step::ALL {
        steps.insert(step, spread(&[step])?);
    }
    let (first, rest) = Step::ALL.split_at(3);
    Ok(Steps {
        steps,
        to_running: spread(first)?,
        to_gone: spread(rest)?,
        all_running: milliseconds(running),
    })
}

fn daemon(target: &Target) -> anyhow::Result<Memory> {
    let pid = processes::server_of(&target.socket()).context("find the runtime's process")?;
    let split = memory::of_process(pid).with_context(|| format!("read the memory of process {pid}"))?;
    Ok(split.own)
}

async fn cost(run_dir: &Path, sandbox: &str) -> anyhow::Result<PodCost> {
    let mut cost = PodCost::default();
    for process in processes::of_sandbox(sandbox).context("find the pod's processes")? {
        // A short-lived helper may be gone by now.
        let Ok(Split { own, guest }) = memory::of_process(process.pid) else { continue };
        if guest.resident > 0 {
            *cost.vmm.get_or_insert_default() += own;
            *cost.guest.get_or_insert_default() += guest;
        }
        cost.whole += own;
        cost.whole += guest;
        cost.processes.push(process.name);
    }
    let agent = agent::vsock_of(run_dir, sandbox).filter(|vsock| vsock.exists());
    if let Some(vsock) = agent {
        cost.agent_resident = Some(agent::resident(vsock).await?);
    }
    Ok(cost)
}

fn mean(costs: &[PodCost]) -> PodCost {
    let count = costs.len().max(1) as u64;
    let average = |memories: Vec<Memory>| {
        let mut sum = Memory::default();
        memories.into_iter().for_each(|memory| sum += memory);
        Memory { resident: sum.resident / count, proportional: sum.proportional / count }
    };
    let optional = |memories: Vec<Memory>| (!memories.is_empty()).then(|| average(memories));
    let agents: Vec<u64> = costs.iter().filter_map(|cost| cost.agent_resident).collect();
    PodCost {
        vmm: optional(costs.iter().filter_map(|cost| cost.vmm).collect()),
        guest: optional(costs.iter().filter_map(|cost| cost.guest).collect()),
        whole: average(costs.iter().map(|cost| cost.whole).collect()),
        agent_resident: (!agents.is_empty()).then(|| agents.iter().sum::<u64>() / count),
        processes: costs.first().map(|cost| cost.processes.clone()).unwrap_or_default(),
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn pods_are_summed_step_by_step() {
        let pod = |factor: u64| -> Times {
            Step::ALL.iter().zip(1..).map(|(step, n)| (*step, Duration::from_millis(n * factor))).collect()
        };
        let steps = summary(&[pod(1), pod(10), pod(100)], Duration::from_secs(1)).unwrap();
        assert_eq!(steps.to_running.median, 60.0);
        assert_eq!(steps.to_gone.max, 2200.0);
        assert_eq!(steps.steps[&Step::StartContainer].min, 3.0);
        assert_eq!(steps.all_running, 1000.0);
        assert!(summary(&[], Duration::ZERO).is_err());
    }

    #[test]
    fn a_pod_without_a_machine_has_no_guest() {
        let whole = |bytes| Memory { resident: bytes, proportional: bytes / 2 };
        let costs = [100, 300].map(|bytes| PodCost { whole: whole(bytes), ..Default::default() });
        let mean = mean(&costs);
        assert_eq!(mean.whole, whole(200));
        assert!(mean.vmm.is_none() && mean.guest.is_none() && mean.agent_resident.is_none());
    }
}
