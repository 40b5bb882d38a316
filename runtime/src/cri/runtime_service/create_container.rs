//! CreateContainer: the image's disk and the volumes into the machine, the OCI
//! configuration, `runc create` by the agent, the log.

use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use husk_proto::agent;
use husk_proto::cri::{self, CreateContainerRequest, CreateContainerResponse};

use super::remove_container;
use crate::apparmor::{self, Confinement};
use crate::cdi;
use crate::config::{Handler, Kind};
use crate::container::log::LogFile;
use crate::container::{Container, Record, State, now, spec, supervise};
use crate::cri::error::Error;
use crate::cri::names;
use crate::events::EventKind;
use crate::id::ContainerId;
use crate::image::Image;
use crate::node::Node;
use crate::sandbox::{Phase, Sandbox, cpus, oom_score};
use crate::storage::image_volumes::{self, ImageVolume};
use crate::storage::volumes::{self, Prepared, Shared, Volume};
use crate::vm::{self, Claim, Machine, file_server};

/// Makes a container, or leaves nothing behind.
pub(super) async fn create_container(
    node: &Arc<Node>,
    request: CreateContainerRequest,
) -> Result<CreateContainerResponse, Error> {
    let mut config =
        request.config.ok_or_else(|| Error::InvalidArgument("no container configuration".into()))?;
    if config.metadata.as_ref().is_none_or(|metadata| metadata.name.is_empty()) {
        return Err(Error::InvalidArgument("container metadata needs a name".into()));
    }
    let sandbox = node.registry.sandbox(&request.pod_sandbox_id)?;
    let _verb = sandbox.verb.lock().await;
    let machine = ready_machine(&sandbox)?;
    runs_nothing_unknown(node, &sandbox)?;
    let image = image_of(node, &config)?;

    let id = ContainerId::random();
    let name = node.registry.reserve(names::container(&config, &sandbox.record().config), id.as_str())?;
    let pod = sandbox.record().config.clone();
    privileged_only_in_privileged(&pod, &config)?;
    let log_path = log_path(&pod, &config)?;
    let host = host_places(node, &sandbox)?;
    let handler = node.config.handler(&sandbox.record().handler).map(|(_, handler)| handler);
    let mut hooks = handler.map(|handler| handler.hooks.clone()).unwrap_or_default();
    let confinement = confinement(&sandbox, &config, handler)?;
    let nodes = cdi::apply(&mut config, &node.config.cdi.dirs, host.is_some().then_some(&mut hooks))?;
    let mut image_volumes =
        image_volumes::wanted(&config.mounts, |image| Ok::<_, Error>(resolve(node, &image.image)?.rootfs))?;
    let image_config = image.config.config().clone().unwrap_or_default();
    // On the host its mounts are as they are.
    let mounts = if host.is_some() { &[][..] } else { &config.mounts };
    let in_use = sandbox.volumes();
    let trusted = handler.map(|handler| &handler.trusted_volumes[..]).unwrap_or_default();
    let prepared = volumes::prepare(mounts, &in_use, trusted)?;
    let volumes: Vec<_> = prepared.iter().map(|one| one.volume.clone()).collect();
    let input = spec::Input {
        hooks: &hooks,
        id: &id,
        config: &config,
        sandbox: &pod,
        image: &image_config,
        volumes: &volumes,
        image_volumes: &image_volumes,
        target_pid: target_pid(&sandbox, &config),
        apparmor: confinement.profile.as_deref(),
        host: host.as_ref(),
    };
    let mut spec = spec::build(&input)?;
    nodes.finish(&mut spec)?;
    let user = spec::user(&input)?;
    let stop_signal = super::stop_container::stop_signal(&config, image_config.stop_signal().as_deref())?;

    let mut slots = machine.slots.hold().await;
    let images: Vec<_> =
        [&image.rootfs].into_iter().chain(image_volumes.iter().map(|one| &one.rootfs)).cloned().collect();
    let claims = slots.claim_all(images.iter().map(PathBuf::as_path), &id);
    let claims = claims.ok_or_else(|| vm::Error::NoSlot(slots.count()))?;
    let mut disks = claims.iter().map(|claim| claim.slot().to_owned());
    let image_slot = disks.next().unwrap_or_default();
    for (volume, slot) in image_volumes.iter_mut().zip(disks) {
        volume.slot = slot;
    }
    let record = Record {
        id: id.clone(),
        sandbox_id: sandbox.id.clone(),
        image_id: image.id.to_string(),
        image_tag: tag_of(&image, &config),
        image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string()),
        image_slot,
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
    let container = match Container::create(sandbox.directory(), record) {
        Ok(container) => Arc::new(container),
        Err(error) => {
            slots.give_back(&claims, &id);
            return Err(error.into());
        }
    };
    node.registry.add_container(sandbox.clone(), container.clone());
    let made = async {
        cpus::pin(&sandbox)?;
        for (claim, rootfs) in claims.iter().zip(&images) {
            if let Claim::Attach(slot) = claim {
                machine.keeper.attach_image(slot, rootfs).await?;
            }
        }
        // From here on others may use the disks too.
        drop(slots);
        mount_volumes(node, &sandbox, &machine, &prepared, &in_use).await?;
        oom_score::settle(&sandbox);
        make(&sandbox, &machine, &container, &spec, user, confinement.for_machine).await
    };
    // The machine may have ended meanwhile: whoever noted that left this one out.
    let made = made.await.and_then(|()| ready_machine(&sandbox).map(drop));
    if let Err(error) = made {
        tracing::warn!(container = %id, %error, "container was not made; undoing");
        if let Err(undo) = remove_container::take_apart(node, &sandbox, &container).await {
            tracing::warn!(container = %id, error = %undo, "undo a container that was not made; trying again");
            remove_container::take_apart_later(node, &sandbox, &container);
        }
        return Err(error);
    }
    name.keep();
    sandbox.send_event(id.as_str(), EventKind::Created);
    tracing::info!(container = %id, sandbox = %sandbox.id, "container created");
    Ok(CreateContainerResponse { container_id: id.to_string() })
}

/// A pod with a container of which neither the name nor the disks could be told
/// gets no other: it could be the same one again, or take its disks away.
fn runs_nothing_unknown(node: &Node, sandbox: &Sandbox) -> Result<(), Error> {
    let unread = node.registry.unread_of(&sandbox.id);
    match unread.iter().find(|unread| unread.name.is_none() || unread.disks.is_none()) {
        Some(unread) => Err(Error::FailedPrecondition(format!(
            "the pod has a container `{}` of which nothing is known: {}",
            unread.id,
            unread.advice()
        ))),
        None => Ok(()),
    }
}

/// As the interface has it: who may start privileged containers says so with
/// the pod.
fn privileged_only_in_privileged(
    pod: &cri::PodSandboxConfig,
    config: &cri::ContainerConfig,
) -> Result<(), Error> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let pod = pod.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if security.is_some_and(|security| security.privileged) && !pod.is_some_and(|pod| pod.privileged) {
        return Err(Error::InvalidArgument(
            "container `privileged`: its pod is not; set `privileged` in the pod's security context too"
                .into(),
        ));
    }
    Ok(())
}

/// The first volume of a pod starts its file server.
async fn mount_volumes(
    node: &Node,
    sandbox: &Sandbox,
    machine: &Machine,
    prepared: &[Prepared],
    in_use: &[Volume],
) -> Result<(), Error> {
    for one in prepared.iter().filter(|one| one.volume.live) {
        volumes::live::send(machine, &one.volume).await?;
    }
    let vm::Keeper::Vmm(vmm) = &machine.keeper else { return Ok(()) };
    if prepared.iter().all(|one| one.volume.live) {
        return Ok(());
    }
    let record = sandbox.record().clone();
    let (_, handler) = node.config.handler(&record.handler).ok_or_else(|| {
        Error::FailedPrecondition(format!("the configuration has no handler `{}` any more", record.handler))
    })?;
    let shared = Shared::of(&node.config.run_dir, &sandbox.id);
    shared.open()?;
    let run_dir = vm::run_dir(&node.config.run_dir, &sandbox.id);
    let plan = file_server::Plan {
        id: &sandbox.id,
        program: &handler.file_server,
        root: shared.path(),
        run_dir: &run_dir,
        cgroup: record.cgroup,
        trusted: volumes::TRUSTED,
        users: spec::user_namespace(&record.config)?,
    };
    file_server::ensure(&vmm.control, plan).await?;
    let namespace = file_server::namespace(&run_dir)?.ok_or_else(|| {
        Error::FailedPrecondition("the pod's file server has ended: restart the pod".into())
    })?;
    Ok(shared.bind(namespace.as_fd(), prepared, in_use)?)
}

/// The agent makes the container, and its output is followed from the first
/// byte on.
async fn make(
    sandbox: &Arc<Sandbox>,
    machine: &Arc<Machine>,
    container: &Arc<Container>,
    spec: &oci_spec::runtime::Spec,
    user: agent::User,
    apparmor: Option<agent::AppArmor>,
) -> Result<(), Error> {
    let record = container.record().clone();
    if !record.log_path.as_os_str().is_empty() {
        let log = LogFile::open(&record.log_path).map_err(|cause| Error::File {
            stage: "open container log",
            path: record.log_path.clone(),
            cause,
        })?;
        container.set_log(Some(Arc::new(log)));
    }
    let request = agent::CreateContainerRequest {
        container_id: container.id.to_string(),
        spec_json: serde_json::to_vec(spec).map_err(|error| Error::Internal(error.to_string()))?,
        rootfs: Some(rootfs_of(machine, &record.image_slot, &record.image_rootfs)),
        image_volumes: record.image_volumes.iter().map(|volume| image_volume_of(machine, volume)).collect(),
        user: Some(user),
        terminal: record.config.tty,
        stdin: record.config.stdin,
        stdin_once: record.config.stdin_once,
        apparmor,
        all_devices: spec::privileged(&record.config),
    };
    let made = machine
        .agent
        .call("create container", async |mut agent| agent.create_container(request).await)
        .await?;
    if !made.start_error.is_empty() {
        // Its program cannot be started. That is for StartContainer to tell.
        container.update(|record| {
            record.start_error = made.start_error;
            record.state = State::Created;
        })?;
        return Ok(());
    }
    supervise::follow(sandbox, machine, container).await.map_err(|cause| Error::File {
        stage: "open container output",
        path: container.id.as_str().into(),
        cause,
    })?;
    volumes::live::follow(machine, container);
    container.update(|record| {
        record.guest_pid = made.pid;
        record.user = made.identity.map(|identity| cri::LinuxContainerUser {
            uid: identity.uid.into(),
            gid: identity.gid.into(),
            supplemental_groups: identity.groups.into_iter().map(i64::from).collect(),
        });
        record.state = State::Created;
    })?;
    Ok(())
}

/// A machine has the image as a disk; on the host the agent reads the file.
fn rootfs_of(machine: &Machine, slot: &str, rootfs: &Path) -> agent::Rootfs {
    let image_file = match machine.keeper {
        vm::Keeper::Vmm(_) => String::new(),
        vm::Keeper::Supervisor(_) => rootfs.display().to_string(),
    };
    agent::Rootfs { image_serial: slot.to_owned(), image_file }
}

fn image_volume_of(machine: &Machine, volume: &ImageVolume) -> agent::ImageVolume {
    agent::ImageVolume {
        image: Some(rootfs_of(machine, &volume.slot, &volume.rootfs)),
        destination: volume.container_path.display().to_string(),
        sub_path: volume.sub_path.clone(),
    }
}

/// The container's AppArmor profile, and what its machine needs for it.
fn confinement(
    sandbox: &Sandbox,
    config: &cri::ContainerConfig,
    handler: Option<&Handler>,
) -> Result<Confinement, Error> {
    let kernel = apparmor::Kernel::default();
    if sandbox.record().kind == Kind::Vm {
        let others: Vec<_> =
            sandbox.containers().iter().map(|container| container.record().config.clone()).collect();
        return Ok(apparmor::in_machine(&kernel, config, &others)?);
    }
    let policy = handler.map(|handler| handler.apparmor_policy.clone());
    let policy = policy.unwrap_or_else(|| Handler::default().apparmor_policy);
    Ok(apparmor::on_host(&kernel, config, &policy)?)
}

/// Where things of a host pod are.
fn host_places(node: &Node, sandbox: &Sandbox) -> Result<Option<spec::HostPod>, Error> {
    let record = sandbox.record();
    if record.kind == Kind::Vm {
        return Ok(None);
    }
    let cgroup = record.cgroup.clone().ok_or(crate::host::Error::NoCgroups)?;
    Ok(Some(spec::HostPod { directory: vm::run_dir(&node.config.run_dir, &sandbox.id), cgroup }))
}

/// The machine of a sandbox that is ready for containers.
pub(super) fn ready_machine(sandbox: &Sandbox) -> Result<Arc<Machine>, Error> {
    let phase = sandbox.record().phase;
    if phase != Phase::Ready {
        return Err(Error::FailedPrecondition(format!("sandbox `{}` is not ready", sandbox.id)));
    }
    sandbox.machine().ok_or_else(|| {
        Error::FailedPrecondition(format!(
            "sandbox `{}`: its agent has not answered since huskd started: try again, or stop the pod",
            sandbox.id
        ))
    })
}

/// The image that a container names, by any of its names.
fn image_of(node: &Node, config: &cri::ContainerConfig) -> Result<Image, Error> {
    let name = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
    if name.is_empty() {
        return Err(Error::InvalidArgument("container configuration names no image".into()));
    }
    resolve(node, name)
}

/// What the image is called: as the client says, if that is one of its tags.
/// The kubelet names an image by its id.
fn tag_of(image: &Image, config: &cri::ContainerConfig) -> String {
    let asked = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
    let tag = image.repo_tags.iter().find(|tag| *tag == asked).or_else(|| image.repo_tags.first());
    tag.cloned().unwrap_or_default()
}

fn resolve(node: &Node, name: &str) -> Result<Image, Error> {
    node.images.resolve(name)?.ok_or_else(|| Error::NoImage(name.to_owned()))
}

/// The pod's log folder and the container's place in it, if both are given. The
/// place must stay inside the folder.
fn log_path(pod: &cri::PodSandboxConfig, config: &cri::ContainerConfig) -> Result<PathBuf, Error> {
    if pod.log_directory.is_empty() || config.log_path.is_empty() {
        return Ok(PathBuf::new());
    }
    let inside = Path::new(&config.log_path);
    if inside.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(Error::InvalidArgument(format!(
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
