//! The runtime as a whole: Version, Status, RuntimeConfig,
//! UpdateRuntimeConfig.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use husk_base::blocking;
use husk_config::{CgroupDriver as Driver, Handler};
use husk_pods::Node;
use husk_proto::cri::{
    CgroupDriver, LinuxRuntimeConfiguration, RuntimeCondition, RuntimeConfigResponse, RuntimeFeatures,
    RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus, StatusRequest, StatusResponse,
    UpdateRuntimeConfigRequest, VersionResponse,
};
use serde_json::{Value, json};

pub(crate) fn version() -> VersionResponse {
    VersionResponse {
        // The version of the request that clients send; it has been this since
        // the kubelet's first days.
        version: "0.1.0".into(),
        runtime_name: "husk".into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        runtime_api_version: "v1".into(),
    }
}

pub(crate) async fn status(node: &Arc<Node>, request: &StatusRequest) -> StatusResponse {
    let looking = node.clone();
    let runtime = blocking(move || runtime_problem(&looking)).await;
    let network = node.network.status().await.err().map(|reason| reason.to_string());
    let conditions = vec![
        condition("RuntimeReady", "MachineNotReady", runtime),
        condition("NetworkReady", "NetworkPluginNotReady", network),
    ];
    let handler = |name: &str| RuntimeHandler {
        name: name.to_owned(),
        features: Some(RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true }),
    };
    // The empty name stands for the default handler.
    let runtime_handlers =
        std::iter::once("").chain(node.config.handlers.keys().map(String::as_str)).map(handler).collect();
    let info = if request.verbose { verbose(node) } else { HashMap::new() };
    StatusResponse {
        status: Some(RuntimeStatus { conditions }),
        info,
        runtime_handlers,
        features: Some(RuntimeFeatures {
            supplemental_groups_policy: true,
            mount_options: true,
            ..Default::default()
        }),
    }
}

fn condition(kind: &str, reason: &str, problem: Option<String>) -> RuntimeCondition {
    let status = problem.is_none();
    RuntimeCondition {
        r#type: kind.into(),
        status,
        reason: if status { String::new() } else { reason.into() },
        message: problem.unwrap_or_default(),
    }
}

/// The reason for which the default handler cannot start pods. This blocks.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn runtime_problem(node: &Node) -> Option<String> {
    let (_, handler) = node.config.handler("")?;
    if node.config.cgroup_driver == Driver::Systemd && !husk_systemd::is_init() {
        return Some("cgroup_driver is \"systemd\", and this host is not run by systemd".into());
    }
    let missing =
        |path: &PathBuf| (!path.exists()).then(|| format!("{} is missing: run `husk check`", path.display()));
    let vm = match handler {
        Handler::Vm(vm) => vm,
        Handler::Host(host) => return missing(&host.agent),
    };
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm: {error}: run `husk check`"));
    }
    [&vm.vmm, &vm.file_server, &vm.kernel, &vm.rootfs].into_iter().find_map(missing)
}

/// The configuration as it counts, with the names that clients of other
/// runtimes look for: `stateDir` is where containers' files are.
fn verbose(node: &Node) -> HashMap<String, String> {
    let mut info = HashMap::new();
    if let Ok(config) = serde_json::to_string(&node.config) {
        info.insert("config".to_owned(), config);
    }
    let unread = node.registry.unread().into_iter().map(|unread| {
        json!({ "what": unread.what, "id": unread.id, "name": unread.name, "path": unread.path, "why": unread.why })
    });
    // Somebody has to look after these; there are none on a node that is well.
    info.insert("unread_records".to_owned(), Value::from_iter(unread).to_string());
    let unfinished = node.registry.unfinished();
    let unfinished = unfinished.iter().map(|(id, why)| json!({ "id": id.as_str(), "why": why }));
    info.insert("unfinished_pods".to_owned(), Value::from_iter(unfinished).to_string());
    info
}

/// Tells the cgroup driver. A kubelet that knows this call asks before it names a pod's parent
/// group; any other must be configured to match.
pub(crate) fn runtime_config(node: &Node) -> RuntimeConfigResponse {
    let driver = match node.config.cgroup_driver {
        Driver::Cgroupfs => CgroupDriver::Cgroupfs,
        Driver::Systemd => CgroupDriver::Systemd,
    };
    RuntimeConfigResponse { linux: Some(LinuxRuntimeConfiguration { cgroup_driver: driver.into() }) }
}

/// The one thing a kubelet sends here is the node's pod CIDR, which CNI
/// configurations on disk already have.
pub(crate) fn update_runtime_config(request: &UpdateRuntimeConfigRequest) {
    let cidr = request.runtime_config.as_ref().and_then(|config| config.network_config.as_ref());
    if let Some(network) = cidr.filter(|network| !network.pod_cidr.is_empty()) {
        tracing::info!(pod_cidr = network.pod_cidr, "pod CIDR noted; CNI's configuration decides");
    }
}
