//! Names that are reserved: what a client says about a pod or container that
//! makes it this one and no other.

use husk_proto::cri;

/// The name of a pod.
#[must_use]
pub fn sandbox(config: &cri::PodSandboxConfig) -> String {
    let pod = config.metadata.clone().unwrap_or_default();
    format!("{}_{}_{}_{}", pod.name, pod.namespace, pod.uid, pod.attempt)
}

/// The name of a container in its pod.
#[must_use]
pub fn container(config: &cri::ContainerConfig, pod: &cri::PodSandboxConfig) -> String {
    let own = config.metadata.clone().unwrap_or_default();
    let pod = pod.metadata.clone().unwrap_or_default();
    format!("{}_{}_{}_{}_{}", own.name, pod.name, pod.namespace, pod.uid, own.attempt)
}
