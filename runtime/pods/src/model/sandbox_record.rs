//! The record of a sandbox.

use std::path::PathBuf;

use husk_backend::VmSize;
use husk_base::id::SandboxId;
use husk_config::Kind;
use husk_proto::cri;
use serde::{Deserialize, Serialize};

/// The record of a sandbox, as it is on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// The sandbox's id.
    pub id: SandboxId,
    /// The configuration that the client asked for.
    pub config: cri::PodSandboxConfig,
    /// The name of its runtime handler, never empty.
    pub handler: String,
    /// The kind of its handler, whatever the handler of that name may be later.
    #[serde(default)]
    pub kind: Kind,
    /// The time of the request, nanoseconds since 1970.
    pub created_at: i64,
    /// How far it is.
    pub phase: Phase,
    /// The pod's addresses, the first one first.
    pub ips: Vec<String>,
    /// The pod's network namespace.
    pub netns: PathBuf,
    /// Process id of its VMM, or of its supervisor on the host, for people; nothing is ever done to a process by
    /// this number.
    pub vmm_pid: u32,
    /// The control group of its VMM, or of all processes of a host pod.
    pub cgroup: Option<PathBuf>,
    /// How many processes the kernel had killed in that group for want of memory
    /// when the pod became ready.
    #[serde(default)]
    pub oom_kills: u64,
    /// The size that its VM was made with.
    #[serde(default)]
    pub size: Option<VmSize>,
    /// How many slots for images its machine was made with.
    #[serde(default)]
    pub image_slots: Option<u8>,
    /// How long each step of its start took.
    pub boot: BootTimes,
    /// The reason for which it is not ready, if something went wrong.
    pub problem: String,
}

/// How far a sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The pod is being made, and not shown to clients. After a crash it is torn down.
    Creating,
    /// The pod runs.
    Ready,
    /// The pod was stopped, or has ended by itself.
    NotReady,
}

/// Milliseconds of each step from request to ready.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct BootTimes {
    /// Network namespace, CNI and tap.
    pub network: u64,
    /// Start of the VMM's process to the first entry into the guest.
    pub vmm: u64,
    /// From there to the agent's first word.
    pub kernel: u64,
    /// From there to an open connection.
    pub agent: u64,
    /// The agent's work on the sandbox.
    pub configure: u64,
    /// The whole start.
    pub total: u64,
}
