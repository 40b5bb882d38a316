//! RPCs of a container's life: create, start, update, remove.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::{
    CreateContainerRequest, CreateContainerResponse, Identity, RemoveContainerRequest,
    RemoveContainerResponse, StartContainerRequest, StartContainerResponse, UpdateContainerRequest,
    UpdateContainerResponse, paths,
};
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::time::timeout;

use super::{Agent, Error, Stage, sandbox};
use crate::container::Container;
use crate::container::bundle::{Bundle, Sources};
use crate::container::{devices, resources, spec, user};
use crate::guest::cgroup::Cgroup;
use crate::id;
use crate::pod::shared_dir;
use crate::process::runc;
use crate::process::stdio::{CONSOLES, Stdio};
use crate::process::{Process, Role};

/// How long a container may take to end once it is killed. Only a process that
/// waits for a disk takes more than a moment.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Serves `CreateContainer`.
pub async fn create(
    agent: Arc<Agent>,
    request: CreateContainerRequest,
) -> Result<CreateContainerResponse, Error> {
    let id = request.container_id.clone();
    id::check("container_id", &id)?;
    let rootfs = request.rootfs.clone().unwrap_or_default();
    let images = request.image_volumes.iter().filter_map(|volume| volume.image.as_ref());
    for image in images.chain([&rootfs]) {
        id::check("image_serial", &image.image_serial)?;
    }
    let mut config = spec::parse(&request.spec_json).invalid("spec_json")?;
    let cgroup = spec::choose_cgroup(&mut config, &id).invalid("spec_json")?;
    sandbox::check_created(&agent)?;

    if shared_dir::is_used_by(&config) {
        agent.shared.mount().await.stage("mount the volumes")?;
    }
    if let Some(wanted) = &request.apparmor {
        let loaded = agent.policies.load(wanted).await;
        let loaded = loaded.map_err(|error| Error::Precondition(format!("load AppArmor policy: {error}")))?;
        if !loaded && let Some(process) = config.process_mut() {
            process.set_apparmor_profile(None);
        }
    }
    if request.all_devices {
        devices::add_all(&mut config).stage("list the devices")?;
    }
    // The reservation ends when this function fails, and the bundle with it.
    let reservation = agent.containers.reserve(&id)?;
    let root = agent.mapped_root.get().copied();
    let sources =
        Sources { mode: &agent.mode, images: &agent.images, disks: &agent.disks, mapped_root: root };
    let mut bundle = Bundle::prepare(&id, &rootfs, &request.image_volumes, sources)
        .await
        .stage("mount the root filesystem")?;
    bundle.add_directories(spec::own_directories(&config), root).await.stage("make an image's volumes")?;
    bundle.map_ids(&mut config).await.map_err(|error| Error::Precondition(error.to_string()))?;
    let created = create_in(&agent, &request, config, cgroup, &bundle).await;
    let (init, cgroup, identity) = match created {
        Ok(created) => created,
        Err(error) => {
            if let Err(left) = bundle.remove().await {
                tracing::warn!(container = %id, error = %left, "failed to undo the creation of a container");
            }
            return match error {
                NotCreated::ByRunc(words) => {
                    Ok(CreateContainerResponse { start_error: words, ..Default::default() })
                }
                NotCreated::Failed(error) => Err(error),
            };
        }
    };
    let pid = init.pid().as_raw().unsigned_abs();
    reservation.publish(Container::new(id, bundle, cgroup, init));
    Ok(CreateContainerResponse { pid, identity: Some(identity), start_error: String::new() })
}

/// The reason that a container could not be made.
enum NotCreated {
    /// runc reports that the container cannot run.
    ByRunc(String),
    /// An earlier or later stage failed.
    Failed(Error),
}

impl From<Error> for NotCreated {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The part of the creation that needs a mounted bundle.
async fn create_in(
    agent: &Agent,
    request: &CreateContainerRequest,
    mut config: Spec,
    cgroup: Cgroup,
    bundle: &Bundle,
) -> Result<(Process, Arc<Cgroup>, Identity), NotCreated> {
    let id = &request.container_id;
    let asked = request.user.clone().unwrap_or_default();
    let identity = user::resolve(&bundle.rootfs(), &asked.user, asked.strict_groups).invalid("user")?;
    resources::fit_to_machine(&mut config, &agent.mode).invalid("spec_json")?;
    if spec::joins(&config, &agent.mode.at(paths::PID_NAMESPACE)) {
        sandbox::share_pid_namespace(agent).await?;
    }
    spec::place_volumes(&mut config, &bundle.volumes().stage("mount an image volume")?)
        .invalid("image_volumes")?;
    spec::complete(&mut config, &bundle.rootfs(), &identity, &asked, request.terminal)
        .invalid("spec_json")?;
    let json = serde_json::to_vec(&config).stage("write the bundle")?;
    let identity = spec::identity(&config);
    drop(config);
    bundle.write_config(&json).stage("write the bundle")?;

    let mut stdio = Stdio::new(&agent.mode.at(CONSOLES), request.terminal, request.stdin)
        .stage("open standard streams")?;
    let created = agent.runc.create(id, bundle.path(), &mut stdio).await;
    let adopted = match created {
        Ok(process) => adopt(process, stdio, request.stdin_once, Role::Init, Arc::new(cgroup))
            .await
            .map_err(NotCreated::from),
        Err(runc::Error::Refused(words)) => Err(NotCreated::ByRunc(words)),
        Err(error) => Err(Error::Failed { stage: "runc create", cause: error.to_string() }.into()),
    };
    if adopted.is_err()
        && let Err(left) = agent.runc.delete(id, bundle.path()).await
    {
        tracing::warn!(container = %id, error = %left, "failed to undo runc create");
    }
    adopted.map(|(process, cgroup)| (process, cgroup, identity))
}

/// Takes charge of a process that runc has just started.
pub async fn adopt(
    process: (nix::unistd::Pid, crate::process::reaper::Exited),
    stdio: Stdio,
    stdin_once: bool,
    role: Role,
    cgroup: Arc<Cgroup>,
) -> Result<(Process, Arc<Cgroup>), Error> {
    let pid = process.0;
    let adopted = match stdio.into_ends().await {
        Ok(ends) => Process::new(process, ends, stdin_once, role, cgroup.clone()),
        Err(error) => Err(error),
    };
    if adopted.is_err() {
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
    Ok((adopted.stage("open standard streams")?, cgroup))
}

/// Serves `StartContainer`.
pub async fn start(
    agent: Arc<Agent>,
    request: StartContainerRequest,
) -> Result<StartContainerResponse, Error> {
    let container = agent.containers.get(&request.container_id)?;
    container.begin_start()?;
    let init = (container.init.pid(), container.init.exit());
    let started = agent.runc.start(&container.id, container.bundle.path(), init).await;
    container.end_start(started.is_ok());
    started.stage("runc start")?;
    Ok(StartContainerResponse {})
}

/// Serves `UpdateContainer`.
pub async fn update(
    agent: Arc<Agent>,
    request: UpdateContainerRequest,
) -> Result<UpdateContainerResponse, Error> {
    let container = agent.containers.get(&request.container_id)?;
    if container.init.has_exited() {
        return Err(Error::Precondition(format!("container {} has exited", container.id)));
    }
    // The JSON is parsed and written again, so that runc gets nothing but
    // limits.
    let resources: LinuxResources =
        serde_json::from_slice(&request.resources_json).invalid("resources_json")?;
    let resources = resources::for_update(resources, &agent.mode).invalid("resources_json")?;
    let file = container.bundle.path().join("update.json");
    let json = serde_json::to_vec(&resources).stage("write the resources")?;
    fs::write(&file, json).stage("write the resources")?;
    let updated = agent.runc.update(&container.id, container.bundle.path(), &file).await;
    let _ = fs::remove_file(&file);
    updated.stage("runc update")?;
    if request.oom_score_adj != 0 {
        container.cgroup.set_oom_score_adj(request.oom_score_adj).stage("set oom_score_adj")?;
    }
    Ok(UpdateContainerResponse {})
}

/// Serves `RemoveContainer`.
pub async fn remove(
    agent: Arc<Agent>,
    request: RemoveContainerRequest,
) -> Result<RemoveContainerResponse, Error> {
    id::check("container_id", &request.container_id)?;
    let Some(removal) = agent.containers.begin_removal(&request.container_id)? else {
        return Ok(RemoveContainerResponse {});
    };
    let container = &removal.container;
    container.cgroup.kill();
    timeout(KILL_DEADLINE, container.init.exited())
        .await
        .map_err(|_| format!("still alive {} s after SIGKILL", KILL_DEADLINE.as_secs()))
        .stage("kill the container")?;
    // An exec may just have been starting, so the kill is repeated.
    container.cgroup.kill();
    agent.runc.delete(&container.id, container.bundle.path()).await.stage("runc delete")?;
    container.bundle.remove().await.stage("remove the root filesystem")?;
    agent.shared.forget_unused().await;
    removal.finish();
    Ok(RemoveContainerResponse {})
}
