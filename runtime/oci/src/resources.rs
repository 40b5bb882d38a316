//! Resource limits of a container.

use std::collections::HashMap;

use husk_proto::cri;
use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxHugepageLimit,
    LinuxHugepageLimitBuilder, LinuxMemoryBuilder, LinuxResources, LinuxResourcesBuilder,
};

use super::Error;

pub(super) fn build(
    config: &cri::ContainerConfig,
    devices: Vec<LinuxDeviceCgroup>,
    privileged: bool,
) -> Result<LinuxResources, Error> {
    let asked = config.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
    let mut rules = if privileged { vec![allow_all()?] } else { vec![deny_all()?] };
    rules.extend(devices);
    let mut limits = limits(&asked)?;
    limits.set_devices(Some(rules));
    Ok(limits)
}

/// The limits that can also be changed later.
///
/// # Errors
/// A number is out of its range.
pub fn limits(asked: &cri::LinuxContainerResources) -> Result<LinuxResources, Error> {
    let mut cpu = LinuxCpuBuilder::default();
    if asked.cpu_shares > 0 {
        cpu = cpu.shares(unsigned(asked.cpu_shares, "cpu_shares")?);
    }
    if asked.cpu_quota != 0 {
        cpu = cpu.quota(asked.cpu_quota);
    }
    if asked.cpu_period > 0 {
        cpu = cpu.period(unsigned(asked.cpu_period, "cpu_period")?);
    }
    // `cpuset_cpus` and `cpuset_mems` name CPUs of the host: the pod's control group gets them.
    let mut memory = LinuxMemoryBuilder::default();
    if asked.memory_limit_in_bytes > 0 {
        memory = memory.limit(asked.memory_limit_in_bytes);
        let swap = asked.memory_swap_limit_in_bytes;
        memory = memory.swap(if swap > 0 { swap } else { asked.memory_limit_in_bytes });
    }
    let mut resources = LinuxResourcesBuilder::default().cpu(cpu.build()?).memory(memory.build()?);
    if !asked.hugepage_limits.is_empty() {
        resources = resources
            .hugepage_limits(asked.hugepage_limits.iter().map(hugepages).collect::<Result<Vec<_>, _>>()?);
    }
    if !asked.unified.is_empty() {
        resources = resources.unified(asked.unified.clone().into_iter().collect::<HashMap<_, _>>());
    }
    Ok(resources.build()?)
}

/// The OOM score that is asked for, which orders the processes that the kernel kills for
/// memory.
///
/// # Errors
/// The score is out of the kernel's range.
pub fn oom_score_adj(asked: &cri::LinuxContainerResources) -> Result<Option<i32>, Error> {
    let score = i32::try_from(asked.oom_score_adj).ok().filter(|score| (-1000..=1000).contains(score));
    match score {
        Some(0) => Ok(None),
        Some(score) => Ok(Some(score)),
        None => Err(Error::Invalid(format!("oom_score_adj {} is not -1000 to 1000", asked.oom_score_adj))),
    }
}

fn hugepages(limit: &cri::HugepageLimit) -> Result<LinuxHugepageLimit, Error> {
    let bytes = i64::try_from(limit.limit)
        .map_err(|_| Error::Invalid(format!("hugepage limit {} is too large", limit.limit)))?;
    Ok(LinuxHugepageLimitBuilder::default().page_size(limit.page_size.clone()).limit(bytes).build()?)
}

fn unsigned(value: i64, what: &str) -> Result<u64, Error> {
    u64::try_from(value).map_err(|_| Error::Invalid(format!("{what} {value} is negative")))
}

fn deny_all() -> Result<LinuxDeviceCgroup, Error> {
    Ok(LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?)
}

fn allow_all() -> Result<LinuxDeviceCgroup, Error> {
    Ok(LinuxDeviceCgroupBuilder::default().allow(true).access("rwm").build()?)
}
