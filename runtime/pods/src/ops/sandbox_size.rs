//! The size of a pod's VM.

use husk_config::Handler;
use husk_proto::cri;

use crate::model::Size;

/// What the pod's containers may use together, when the client says so.
fn pod_resources(config: &cri::PodSandboxConfig) -> Option<&cri::LinuxContainerResources> {
    config.linux.as_ref()?.resources.as_ref()
}

/// The size of the VM that a pod needs.
pub(crate) fn size(config: &cri::PodSandboxConfig, handler: &Handler) -> Size {
    Size { vcpus: vcpus(config, handler), memory_mib: memory_mib(config, handler) }
}

/// As many as the pod's CPU limit takes, at least the handler's number.
fn vcpus(config: &cri::PodSandboxConfig, handler: &Handler) -> u8 {
    let limit = pod_resources(config).filter(|limit| limit.cpu_quota > 0 && limit.cpu_period > 0);
    let wanted =
        limit.map_or(0, |limit| limit.cpu_quota.unsigned_abs().div_ceil(limit.cpu_period.unsigned_abs()));
    u8::try_from(wanted.min(64)).unwrap_or(64).max(handler.vcpus)
}

/// The handler's own memory for the guest, and the pod's limit on top.
fn memory_mib(config: &cri::PodSandboxConfig, handler: &Handler) -> u32 {
    let limit = pod_resources(config).map_or(0, |limit| limit.memory_limit_in_bytes.max(0).unsigned_abs());
    let limit = u32::try_from(limit.div_ceil(1 << 20)).unwrap_or(u32::MAX);
    handler.memory_mib.saturating_add(limit)
}
