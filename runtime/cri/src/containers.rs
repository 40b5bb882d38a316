//! The status of containers: ContainerStatus, ListContainers.

use std::collections::HashMap;

use husk_base::id::SandboxId;
use husk_pods::model::{ContainerRecord, State};
use husk_pods::{Error, Node, ops};
use husk_proto::cri::{
    self, ContainerState, ContainerStatusRequest, ContainerStatusResponse, ListContainersRequest,
    ListContainersResponse,
};
use serde_json::json;

use crate::sandboxes::has_labels;

pub(crate) fn container_status(
    node: &Node,
    request: &ContainerStatusRequest,
) -> Result<ContainerStatusResponse, Error> {
    let (sandbox, container) = node.registry.container(&request.container_id)?;
    let record = container.record();
    let info = if request.verbose { verbose(&record, &sandbox.id) } else { HashMap::new() };
    Ok(ContainerStatusResponse { status: Some(status_of(&record)), info })
}

/// A container's status, as its record tells it.
pub(crate) fn status_of(record: &ContainerRecord) -> cri::ContainerStatus {
    let exit = match &record.state {
        State::Exited(exit) => Some(exit.clone()),
        _ => None,
    };
    let linux = record.config.linux.clone().unwrap_or_default();
    cri::ContainerStatus {
        id: record.id.to_string(),
        metadata: record.config.metadata.clone(),
        state: record.state.cri().into(),
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at: exit.as_ref().map_or(0, |exit| exit.finished_at),
        exit_code: exit.as_ref().map_or(0, |exit| exit.code),
        reason: exit.as_ref().map(|exit| exit.reason.clone()).unwrap_or_default(),
        message: exit.map(|exit| exit.message).unwrap_or_default(),
        image: record.config.image.clone().map(|asked| named(asked, &record.image_tag)),
        image_ref: record.image_ref.clone(),
        image_id: record.image_id.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        mounts: record.config.mounts.clone(),
        log_path: record.log_path.display().to_string(),
        resources: linux.resources.map(|linux| cri::ContainerResources { linux: Some(linux), windows: None }),
        user: record.user.clone().map(|linux| cri::ContainerUser { linux: Some(linux) }),
        stop_signal: ops::cri_signal(record.stop_signal).into(),
    }
}

/// The image as a status tells it: by a tag, as people know it.
fn named(asked: cri::ImageSpec, tag: &str) -> cri::ImageSpec {
    if tag.is_empty() { asked } else { cri::ImageSpec { image: tag.to_owned(), ..asked } }
}

fn verbose(record: &ContainerRecord, sandbox: &SandboxId) -> HashMap<String, String> {
    let info = json!({
        "sandboxID": sandbox,
        "guestPid": record.guest_pid,
        "imageDisk": record.image_slot,
        "imageFile": record.image_rootfs,
        "config": record.config,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

pub(crate) fn list_containers(
    node: &Node,
    request: &ListContainersRequest,
) -> Result<ListContainersResponse, Error> {
    let filter = request.filter.clone().unwrap_or_default();
    let containers = node
        .registry
        .containers()
        .iter()
        .map(|(_, container)| container.record())
        .filter(|record| matches(record, &filter))
        .map(|record| cri::Container {
            id: record.id.to_string(),
            pod_sandbox_id: record.sandbox_id.to_string(),
            state: record.state.cri().into(),
            metadata: record.config.metadata.clone(),
            image: record.config.image.clone(),
            image_ref: record.image_ref.clone(),
            image_id: record.image_id.clone(),
            created_at: record.created_at,
            labels: record.config.labels.clone(),
            annotations: record.config.annotations.clone(),
        })
        .collect();
    Ok(ListContainersResponse { containers })
}

fn matches(record: &ContainerRecord, filter: &cri::ContainerFilter) -> bool {
    record.state.cri() != ContainerState::ContainerUnknown
        && record.id.as_str().starts_with(&filter.id)
        && record.sandbox_id.as_str().starts_with(&filter.pod_sandbox_id)
        && filter.state.as_ref().is_none_or(|wanted| wanted.state == i32::from(record.state.cri()))
        && has_labels(&record.config.labels, &filter.label_selector)
}
