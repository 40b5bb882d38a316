//! The record of a container.

use std::path::PathBuf;

use husk_base::id::{ContainerId, SandboxId};
use husk_base::now;
use husk_proto::cri;
use husk_volumes::{ImageVolume, Volume};
use serde::{Deserialize, Serialize};

/// The record of a container, as it is on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// The container's id.
    pub id: ContainerId,
    /// The id of its pod.
    pub sandbox_id: SandboxId,
    /// The configuration that the client asked for.
    pub config: cri::ContainerConfig,
    /// The id of the image.
    pub image_id: String,
    /// A tag of the image, for people; empty if it had none.
    #[serde(default)]
    pub image_tag: String,
    /// The image's name in answers: a digest reference if there is one.
    pub image_ref: String,
    /// Serial number of the block device that holds the image in the guest.
    pub image_slot: String,
    /// The file behind that device.
    pub image_rootfs: PathBuf,
    /// The images that are volumes of it.
    #[serde(default)]
    pub image_volumes: Vec<ImageVolume>,
    /// The volumes: files of the host that the container has.
    #[serde(default)]
    pub volumes: Vec<Volume>,
    /// Where its log goes; empty for nowhere.
    pub log_path: PathBuf,
    /// The signal that asks it to stop.
    pub stop_signal: i32,
    /// Process id of its first process in the guest; 0 before it has one.
    pub guest_pid: u32,
    /// The time of the creation, nanoseconds since 1970.
    pub created_at: i64,
    /// The time of the start, nanoseconds since 1970; 0 before it.
    pub started_at: i64,
    /// The user of its first process, by numbers; `None` before it has one.
    #[serde(default)]
    pub user: Option<cri::LinuxContainerUser>,
    /// The reason for which its program cannot be started, if that is known already; there is no
    /// such container in the guest then.
    #[serde(default)]
    pub start_error: String,
    /// Whether hooks run once the container has been deleted.
    #[serde(default)]
    pub poststop: bool,
    /// Where it is in its life.
    pub state: State,
}

impl ContainerRecord {
    /// The disks of the images that it uses, and the files behind them.
    pub fn disks(&self) -> impl Iterator<Item = (String, PathBuf)> {
        let volumes = self.image_volumes.iter().map(|volume| (volume.slot.clone(), volume.rootfs.clone()));
        std::iter::once((self.image_slot.clone(), self.image_rootfs.clone())).chain(volumes)
    }
}

/// Where a container is in its life. It only ever moves down this list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The container is being made, and not shown to clients. After a crash it is torn down.
    Creating,
    /// The container was made, and not started.
    Created,
    /// The container was started.
    Running,
    /// The container has ended.
    Exited(Exit),
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The exit code, 0 to 255.
    pub code: i32,
    /// The time of the end, nanoseconds since 1970.
    pub finished_at: i64,
    /// "Completed", "Error", "OOMKilled", or what happened to the machine.
    pub reason: String,
    /// An explanation for people; may be empty.
    pub message: String,
}

impl Exit {
    /// The end of a process that the agent reported. A guest can say what it likes:
    /// a number that no process ends with is a failure.
    #[must_use]
    pub fn reported(code: i32, oom_killed: bool, finished_at: i64) -> Self {
        let code = if (0..=255).contains(&code) { code } else { 255 };
        let reason = match (oom_killed, code) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        };
        Self { code, finished_at, reason: reason.into(), message: String::new() }
    }

    /// An end of which nobody can say any more how it was: never a success.
    #[must_use]
    pub fn unknown(message: &str) -> Self {
        Self { code: 255, finished_at: now(), reason: "Unknown".into(), message: message.into() }
    }

    /// The end of everything in a machine that the node's kernel killed for want of
    /// memory.
    #[must_use]
    pub fn out_of_memory(message: &str) -> Self {
        let code = 128 + libc::SIGKILL;
        Self { code, finished_at: now(), reason: "OOMKilled".into(), message: message.into() }
    }

    /// The end of everything in a machine that has gone: never a success.
    #[must_use]
    pub fn machine_gone(message: &str) -> Self {
        Self { code: 255, finished_at: now(), reason: "SandboxTerminated".into(), message: message.into() }
    }
}

impl State {
    /// The state as CRI counts it.
    #[must_use]
    pub const fn cri(&self) -> cri::ContainerState {
        match self {
            Self::Creating => cri::ContainerState::ContainerUnknown,
            Self::Created => cri::ContainerState::ContainerCreated,
            Self::Running => cri::ContainerState::ContainerRunning,
            Self::Exited(_) => cri::ContainerState::ContainerExited,
        }
    }

    /// Names the state, for error messages.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Running => "running",
            Self::Exited(_) => "exited",
        }
    }
}
