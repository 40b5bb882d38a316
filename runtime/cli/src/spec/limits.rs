//! Limits of a container, which also size the VM that its pod gets.

use anyhow::bail;

use super::Plan;
use crate::output::units;

/// The period in which a share of the processors' time is counted, microseconds.
const PERIOD: i64 = 100_000;

/// Memory, processors, processes.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// Memory: `512m`, `2g`. A VM gets as much more than a VM without limits has.
    #[arg(short, long, value_name = "BYTES")]
    pub memory: Option<String>,
    /// Memory and swap together; it is not less than `--memory`.
    #[arg(long, value_name = "BYTES")]
    pub memory_swap: Option<String>,
    /// Processors: `2`, `0.5`.
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<f64>,
    /// The weight of the container among others that want the processors.
    #[arg(long, value_name = "WEIGHT")]
    pub cpu_shares: Option<i64>,
    /// Processors of the host, `0-3,7`, on which it may run.
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// The most processes and threads; -1 for no limit.
    #[arg(long, value_name = "NUMBER")]
    pub pids_limit: Option<i64>,
}

impl Limits {
    pub(super) fn apply(&self, plan: &mut Plan) -> anyhow::Result<()> {
        let asked = self.resources()?;
        if asked.cpu_quota != 0 || asked.memory_limit_in_bytes != 0 {
            plan.pod_linux.resources = Some(husk_proto::cri::LinuxContainerResources {
                cpu_period: asked.cpu_period,
                cpu_quota: asked.cpu_quota,
                memory_limit_in_bytes: asked.memory_limit_in_bytes,
                ..Default::default()
            });
        }
        plan.resources = asked;
        Ok(())
    }

    /// The limits in CRI's words; 0 is what is not limited.
    ///
    /// # Errors
    /// An amount that makes no sense.
    pub fn resources(&self) -> anyhow::Result<husk_proto::cri::LinuxContainerResources> {
        let bytes = |given: &Option<String>| given.as_deref().map(units::bytes).transpose();
        let mut resources = husk_proto::cri::LinuxContainerResources {
            memory_limit_in_bytes: bytes(&self.memory)?.unwrap_or_default(),
            memory_swap_limit_in_bytes: bytes(&self.memory_swap)?.unwrap_or_default(),
            cpu_shares: self.cpu_shares.unwrap_or_default(),
            cpuset_cpus: self.cpuset_cpus.clone().unwrap_or_default(),
            ..Default::default()
        };
        let (memory, swap) = (resources.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes);
        if swap != 0 && (memory == 0 || swap < memory) {
            bail!("--memory-swap counts memory and swap together: it needs --memory, and is not less");
        }
        if let Some(cpus) = self.cpus {
            if !(0.001..=1024.0).contains(&cpus) {
                bail!("--cpus {cpus}: a number of processors is 0.001 to 1024");
            }
            resources.cpu_period = PERIOD;
            // A quota below 1 ms is refused by the kernel.
            resources.cpu_quota = ((cpus * 100_000.0) as i64).max(1000);
        }
        if let Some(limit) = self.pids_limit {
            let limit = if limit <= 0 { "max".to_owned() } else { limit.to_string() };
            resources.unified.insert("pids.max".to_owned(), limit);
        }
        Ok(resources)
    }
}
