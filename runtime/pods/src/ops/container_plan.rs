//! The plan of a container, made of the request, the image, the handler and the pod
//! before anything of the container exists.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use husk_backend::{Claim, Place};
use husk_base::id::ContainerId;
use husk_base::now;
use husk_config::Handler;
use husk_image::Image;
use husk_oci::{self as oci, cdi};
use husk_proto::{agent, cri};
use husk_volumes::{ImageVolume, Prepared, Volume};
use oci_spec::runtime::Spec;

use super::signals;
use crate::model::{ContainerRecord, Sandbox, SandboxOp, State};
use crate::{Error, Node};

/// A container that is to be made.
pub(crate) struct ContainerPlan {
    /// The container's record, without the disks of its images.
    record: ContainerRecord,
    /// The OCI configuration for runc.
    pub spec: Spec,
    /// The user of its first process, by name or by numbers.
    pub user: agent::User,
    /// The policy that its VM needs for its AppArmor profile.
    pub apparmor: Option<agent::AppArmor>,
    /// The volumes that are mounted for it, held open.
    pub volumes: Vec<Prepared>,
    /// The volumes that other containers of the pod have.
    pub volumes_in_use: Vec<Volume>,
    /// The files of its images, its own first.
    pub images: Vec<PathBuf>,
    /// Where its pod is.
    pub place: Place,
}

impl ContainerPlan {
    /// Plans the container `id` of a pod. Profiles, devices and volumes are files of the
    /// host, some of which the client names.
    ///
    /// # Errors
    /// The error names the part of the request that the container cannot have, and the reason.
    pub async fn new(
        node: &Arc<Node>,
        sandbox: &SandboxOp<'_>,
        id: &ContainerId,
        config: cri::ContainerConfig,
    ) -> Result<Self, Error> {
        let (node, pod, id) = (node.clone(), Arc::clone(sandbox), id.clone());
        sandbox.lane.run("plan container", move || Self::plan(&node, &pod, &id, config)).await?
    }

    /// This blocks.
    fn plan(
        node: &Node,
        sandbox: &Sandbox,
        id: &ContainerId,
        mut config: cri::ContainerConfig,
    ) -> Result<Self, Error> {
        let image = image_of(node, &config)?;
        let pod_record = sandbox.record();
        let pod = &pod_record.config;
        privileged_only_in_privileged(pod, &config)?;
        let log_path = log_path(pod, &config)?;
        let place = sandbox.place(&node.config.run_dir);
        let host = place.host_pod()?;
        let handler = node.config.handler(&pod_record.handler).map(|(_, handler)| handler);
        let mut hooks = handler.map(|handler| handler.hooks().clone()).unwrap_or_default();
        let others: Vec<_> =
            sandbox.containers().iter().map(|container| container.record().config.clone()).collect();
        let confinement = place.confinement(&config, &others, handler)?;
        let nodes = cdi::apply(&mut config, &node.config.cdi.dirs, host.is_some().then_some(&mut hooks))?;
        let image_volumes = image_volumes(node, &config)?;
        let image_config = image.config.config().clone().unwrap_or_default();
        // On the host its mounts are as they are.
        let mounts = if host.is_some() { Vec::new() } else { config.mounts.clone() };
        let volumes_in_use = sandbox.volumes();
        let trusted = handler.and_then(Handler::vm).map(|vm| vm.trusted_volumes.clone()).unwrap_or_default();
        let prepared = husk_volumes::prepare(&mounts, &volumes_in_use, &trusted)?;
        let volumes: Vec<_> = prepared.iter().map(|one| one.volume.clone()).collect();
        let input = oci::Input {
            hooks: &hooks,
            id,
            config: &config,
            sandbox: pod,
            image: &image_config,
            volumes: &volumes,
            image_volumes: &image_volumes,
            target_pid: target_pid(sandbox, &config),
            apparmor: confinement.profile.as_deref(),
            host: host.as_ref(),
        };
        let mut spec = oci::build(&input)?;
        nodes.finish(&mut spec)?;
        let user = oci::user(&input)?;
        let stop_signal = signals::stop_signal(&config, image_config.stop_signal().as_deref())?;
        let images =
            [&image.rootfs].into_iter().chain(image_volumes.iter().map(|one| &one.rootfs)).cloned().collect();
        let record = ContainerRecord {
            id: id.clone(),
            sandbox_id: sandbox.id.clone(),
            image_id: image.id.to_string(),
            image_tag: tag_of(&image, &config),
            image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string()),
            image_slot: String::new(),
            image_rootfs: image.rootfs.clone(),
            image_volumes,
            volumes,
            log_path,
            stop_signal,
            guest_pid: 0,
            created_at: now(),
            started_at: 0,
            user: None,
            start_error: String::new(),
            poststop: !hooks.poststop.is_empty(),
            state: State::Creating,
            config,
        };
        let apparmor = confinement.for_machine;
        Ok(Self { record, spec, user, apparmor, volumes: prepared, volumes_in_use, images, place })
    }

    /// The container's record, with the disks that were claimed for its images.
    pub fn record(&self, claims: &[Claim]) -> ContainerRecord {
        let mut record = self.record.clone();
        let mut disks = claims.iter().map(|claim| claim.slot().to_owned());
        record.image_slot = disks.next().unwrap_or_default();
        for (volume, disk) in record.image_volumes.iter_mut().zip(disks) {
            volume.slot = disk;
        }
        record
    }
}

/// The image that a container names, by any of its names.
fn image_of(node: &Node, config: &cri::ContainerConfig) -> Result<Image, Error> {
    let name = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
    if name.is_empty() {
        return Err(Error::Invalid("container configuration names no image".into()));
    }
    resolve(node, name)
}

fn resolve(node: &Node, name: &str) -> Result<Image, Error> {
    node.images.resolve(name)?.ok_or_else(|| Error::NoImage(name.to_owned()))
}

fn image_volumes(node: &Node, config: &cri::ContainerConfig) -> Result<Vec<ImageVolume>, Error> {
    husk_volumes::image::wanted(&config.mounts, |image| Ok::<_, Error>(resolve(node, &image.image)?.rootfs))
}

/// Refuses a privileged container in a pod that is not privileged: CRI has clients say with
/// the pod that its containers may be.
fn privileged_only_in_privileged(
    pod: &cri::PodSandboxConfig,
    config: &cri::ContainerConfig,
) -> Result<(), Error> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let pod = pod.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if security.is_some_and(|security| security.privileged) && !pod.is_some_and(|pod| pod.privileged) {
        return Err(Error::Invalid(
            "container `privileged`: its pod is not; set `privileged` in the pod's security context too"
                .into(),
        ));
    }
    Ok(())
}

/// The image's tag: as the client says, if that is one of its tags.
/// The kubelet names an image by its id.
fn tag_of(image: &Image, config: &cri::ContainerConfig) -> String {
    let asked = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
    let tag = image.repo_tags.iter().find(|tag| *tag == asked).or_else(|| image.repo_tags.first());
    tag.cloned().unwrap_or_default()
}

/// The pod's log folder and the container's place in it, if both are given. The
/// place must stay inside the folder.
fn log_path(pod: &cri::PodSandboxConfig, config: &cri::ContainerConfig) -> Result<PathBuf, Error> {
    if pod.log_directory.is_empty() || config.log_path.is_empty() {
        return Ok(PathBuf::new());
    }
    let inside = Path::new(&config.log_path);
    if inside.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(Error::Invalid(format!(
            "log_path `{}` must be a path inside the pod's log directory",
            config.log_path
        )));
    }
    Ok(Path::new(&pod.log_directory).join(inside))
}

/// The first process of the container whose pid namespace is asked for.
fn target_pid(sandbox: &Sandbox, config: &cri::ContainerConfig) -> Option<u32> {
    let options = config.linux.as_ref()?.security_context.as_ref()?.namespace_options.as_ref()?;
    let target =
        sandbox.containers().into_iter().find(|container| container.id.as_str() == options.target_id)?;
    let record = target.record();
    (record.state == State::Running).then_some(record.guest_pid)
}
