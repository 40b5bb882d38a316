//! The size of a pod's VM.

use husk_config::VmHandler;
use husk_proto::cri;
use serde::{Deserialize, Serialize};

/// The size of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
}

impl VmSize {
    /// The size of the VM that a pod of this configuration needs.
    #[must_use]
    pub fn of(config: &cri::PodSandboxConfig, handler: &VmHandler) -> Self {
        Self { vcpus: vcpus(config, handler), memory_mib: memory_mib(config, handler) }
    }
}

/// The limits of all containers of the pod together, when the client sets them.
fn pod_resources(config: &cri::PodSandboxConfig) -> Option<&cri::LinuxContainerResources> {
    config.linux.as_ref()?.resources.as_ref()
}

/// The pod's memory limit, MiB; 0 without one.
#[must_use]
pub fn memory_limit_mib(config: &cri::PodSandboxConfig) -> u64 {
    let limit = pod_resources(config).map_or(0, |limit| limit.memory_limit_in_bytes.max(0).unsigned_abs());
    limit.div_ceil(1 << 20)
}

/// The number of vCPUs: as many as the pod's CPU limit takes, at least the handler's number.
fn vcpus(config: &cri::PodSandboxConfig, handler: &VmHandler) -> u8 {
    let limit = pod_resources(config).filter(|limit| limit.cpu_quota > 0 && limit.cpu_period > 0);
    let wanted =
        limit.map_or(0, |limit| limit.cpu_quota.unsigned_abs().div_ceil(limit.cpu_period.unsigned_abs()));
    u8::try_from(wanted.min(64)).unwrap_or(64).max(handler.vcpus)
}

/// The handler's own memory for the guest, and the pod's limit on top.
fn memory_mib(config: &cri::PodSandboxConfig, handler: &VmHandler) -> u32 {
    let limit = u32::try_from(memory_limit_mib(config)).unwrap_or(u32::MAX);
    handler.memory_mib.saturating_add(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(cpu_quota: i64, memory_limit_in_bytes: i64) -> (u8, u32) {
        let resources = cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota,
            memory_limit_in_bytes,
            ..Default::default()
        };
        let linux = cri::LinuxPodSandboxConfig { resources: Some(resources), ..Default::default() };
        let config = cri::PodSandboxConfig { linux: Some(linux), ..Default::default() };
        let handler = VmHandler { vcpus: 2, memory_mib: 256, ..VmHandler::default() };
        let VmSize { vcpus, memory_mib } = VmSize::of(&config, &handler);
        (vcpus, memory_mib)
    }

    #[test]
    fn a_vm_has_room_for_the_pods_limits() {
        assert_eq!(sized(0, 0), (2, 256));
        assert_eq!(sized(-1, -1), (2, 256));
        assert_eq!(sized(100_000, 1), (2, 257));
        assert_eq!(sized(250_000, 512 << 20), (3, 768));
        assert_eq!(sized(i64::MAX, i64::MAX), (64, u32::MAX));
    }
}
