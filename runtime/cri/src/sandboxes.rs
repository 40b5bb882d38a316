//! The status of pods: PodSandboxStatus, ListPodSandbox.

use std::collections::HashMap;
use std::sync::Arc;

use husk_base::now;
use husk_pods::model::{Phase, Sandbox, SandboxRecord, State};
use husk_pods::ops::memory_warning;
use husk_pods::{Error, Node};
use husk_proto::cri::{
    self, ListPodSandboxRequest, ListPodSandboxResponse, PodSandboxState, PodSandboxStatusRequest,
    PodSandboxStatusResponse,
};
use serde_json::json;

use crate::containers;

pub(crate) fn pod_sandbox_status(
    node: &Node,
    request: &PodSandboxStatusRequest,
) -> Result<PodSandboxStatusResponse, Error> {
    let sandbox = node.registry.sandbox(&request.pod_sandbox_id)?;
    let record = sandbox.record();
    let info = if request.verbose { verbose(&sandbox) } else { HashMap::new() };
    let containers = sandbox.containers().into_iter().map(|container| container.record());
    Ok(PodSandboxStatusResponse {
        status: Some(status_of(&record)),
        info,
        containers_statuses: containers
            .filter(|container| container.state != State::Creating)
            .map(|container| containers::status_of(&container))
            .collect(),
        timestamp: now(),
    })
}

/// A pod's status, as its record tells it.
pub(crate) fn status_of(record: &SandboxRecord) -> cri::PodSandboxStatus {
    let options = record
        .config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.clone())
        .unwrap_or_default();
    cri::PodSandboxStatus {
        id: record.id.to_string(),
        metadata: record.config.metadata.clone(),
        state: state(record.phase).into(),
        created_at: record.created_at,
        network: Some(network(record)),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace { options: Some(options) }),
        }),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.handler.clone(),
    }
}

/// A pod that is not ready has given its addresses back.
fn network(record: &SandboxRecord) -> cri::PodSandboxNetworkStatus {
    let mut ips = record.ips.iter().filter(|_| record.phase == Phase::Ready).cloned();
    cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    }
}

fn verbose(sandbox: &Sandbox) -> HashMap<String, String> {
    let record = sandbox.record();
    let info = json!({
        "pid": record.vmm_pid,
        "netns": record.netns,
        "cgroup": record.cgroup,
        "boot_milliseconds": record.boot,
        "problem": record.problem,
        "memory_warning": memory_warning(&record),
        "unreached": sandbox.unreached(),
        "versions": sandbox.versions(),
        "config": record.config,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

const fn state(phase: Phase) -> PodSandboxState {
    match phase {
        Phase::Ready => PodSandboxState::SandboxReady,
        Phase::Creating | Phase::NotReady => PodSandboxState::SandboxNotready,
    }
}

pub(crate) fn list_pod_sandbox(
    node: &Node,
    request: &ListPodSandboxRequest,
) -> Result<ListPodSandboxResponse, Error> {
    let filter = request.filter.clone().unwrap_or_default();
    let items = node
        .registry
        .sandboxes()
        .iter()
        .filter(|sandbox| matches(sandbox, &filter))
        .map(|sandbox| {
            let record = sandbox.record();
            cri::PodSandbox {
                id: record.id.to_string(),
                metadata: record.config.metadata.clone(),
                state: state(record.phase).into(),
                created_at: record.created_at,
                labels: record.config.labels.clone(),
                annotations: record.config.annotations.clone(),
                runtime_handler: record.handler.clone(),
            }
        })
        .collect();
    Ok(ListPodSandboxResponse { items })
}

fn matches(sandbox: &Arc<Sandbox>, filter: &cri::PodSandboxFilter) -> bool {
    let record = sandbox.record();
    record.id.as_str().starts_with(&filter.id)
        && filter.state.as_ref().is_none_or(|wanted| wanted.state == i32::from(state(record.phase)))
        && has_labels(&record.config.labels, &filter.label_selector)
}

/// Every label that is asked for is there, with its value.
pub(crate) fn has_labels(labels: &HashMap<String, String>, wanted: &HashMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}
