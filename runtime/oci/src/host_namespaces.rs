//! Namespaces of the host for which a pod asks.

use husk_proto::cri::{self, NamespaceMode};

/// Whether the containers of a pod are in the host's network.
#[must_use]
pub fn host_network(sandbox: &cri::PodSandboxConfig) -> bool {
    namespace_options(sandbox).is_some_and(|options| options.network == NamespaceMode::Node as i32)
}

/// Whether the containers of a pod share the host's IPC.
#[must_use]
pub fn host_ipc(sandbox: &cri::PodSandboxConfig) -> bool {
    namespace_options(sandbox).is_some_and(|options| options.ipc == NamespaceMode::Node as i32)
}

/// Whether the containers of a pod see the host's processes.
pub(crate) fn host_pid(sandbox: &cri::PodSandboxConfig) -> bool {
    namespace_options(sandbox).is_some_and(|options| options.pid == NamespaceMode::Node as i32)
}

fn namespace_options(sandbox: &cri::PodSandboxConfig) -> Option<&cri::NamespaceOption> {
    sandbox.linux.as_ref()?.security_context.as_ref()?.namespace_options.as_ref()
}
