//! The lowest floor: the machine or the host that the agent runs on, and
//! interfaces of the kernel. It knows nothing of pods, containers or processes.

pub mod cgroup;
pub mod clock;
pub mod disks;
pub mod host;
pub mod in_root;
pub mod init;
pub mod limits;
pub mod loops;
pub mod machine;
pub mod mode;
pub mod mounts;
pub mod power;
pub mod ready;
pub mod trim;
