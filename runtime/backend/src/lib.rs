//! The backend of a pod: a VM of its own, or namespaces of the host.
//!
//! The question "VM or host pod?" is asked here, and by nobody above. A pod that
//! runs is a [`RunningPod`]; what can be said and done of any other is a matter of
//! its [`Place`]; [`start`] turns a plan into the first.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::path::Path;

use husk_agent_client::Agent;
use husk_base::FileError;
use husk_hostpod::Supervisor;
use husk_proto::agent::Rootfs;
use husk_vm::Vmm;
use husk_vmm_api::Exit;

mod image_disks;
mod place;
mod start;
mod start_vm;
mod vm_size;
mod volumes;

pub use image_disks::{Claim, HeldDisks, ImageDisks};
pub use place::Place;
pub use start::{Services, StartPlan, Started, Times, start};
pub use vm_size::{VmSize, memory_limit_mib};
pub use volumes::{FileServer, VolumeMounts};

/// A pod that runs.
#[derive(Debug)]
pub struct RunningPod {
    /// The process that the pod ends with.
    pub backend: Backend,
    /// The pod's agent: in the VM, or the supervisor on the host.
    pub agent: Agent,
    /// The images that its containers use.
    pub disks: ImageDisks,
}

/// The process that a pod ends with.
#[derive(Clone, Debug)]
pub enum Backend {
    /// The VMM of its VM.
    Vm(Vmm),
    /// The supervisor of its host containers.
    Host(Supervisor),
}

impl Backend {
    /// Returns when the pod has ended, with what is known of the cause. `oom_kills`
    /// is what `cgroup`, the pod's control group, had counted when the pod started.
    pub async fn wait(&self, cgroup: Option<&Path>, oom_kills: u64) -> Ending {
        match self {
            Self::Vm(vmm) => Ending::of_vmm(vmm.ended().await, cgroup, oom_kills).await,
            Self::Host(supervisor) => Ending::of(supervisor.wait().await),
        }
    }

    /// The version of what a VMM speaks with huskd, and its release; `None` for a
    /// host pod, and for a VMM that does not answer.
    pub async fn vmm_version(&self) -> Option<(u32, String)> {
        let Self::Vm(vmm) = self else { return None };
        let info = vmm.control.info().await.ok()?;
        Some((info.protocol, info.release))
    }

    /// Whether the pod has a wall clock of its own, which has to be kept right.
    #[must_use]
    pub const fn has_clock(&self) -> bool {
        matches!(self, Self::Vm(_))
    }

    /// Puts an image into a disk of the VM. On the host the agent takes the file
    /// itself.
    ///
    /// # Errors
    /// The VMM refuses it, or the file does not open.
    pub async fn attach_image(&self, disk: &str, rootfs: &Path) -> Result<(), Error> {
        let Self::Vm(vmm) = self else { return Ok(()) };
        let file = tokio::fs::File::open(rootfs).await.map_err(FileError::at("open image", rootfs))?;
        Ok(vmm.control.attach_disk(disk.to_owned(), file.into_std().await.into()).await?)
    }

    /// Empties a disk of the VM.
    ///
    /// # Errors
    /// The VMM refuses it.
    pub async fn detach_image(&self, disk: String) -> Result<(), Error> {
        match self {
            Self::Vm(vmm) => Ok(vmm.control.detach_disk(disk).await?),
            Self::Host(_) => Ok(()),
        }
    }

    /// Where the agent finds an image: a VM has it as a disk; on the host the agent
    /// reads the file.
    #[must_use]
    pub fn rootfs(&self, disk: &str, file: &Path) -> Rootfs {
        let image_file = match self {
            Self::Vm(_) => String::new(),
            Self::Host(_) => file.display().to_string(),
        };
        Rootfs { image_serial: disk.to_owned(), image_file }
    }
}

/// The reason for which a pod has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ending {
    /// The reason in words; empty for a pod that was asked to end.
    pub problem: String,
    /// The node's kernel killed it for want of memory.
    pub out_of_memory: bool,
}

impl Ending {
    /// An end that nobody asked for.
    #[must_use]
    pub fn of(problem: impl Into<String>) -> Self {
        Self { problem: problem.into(), out_of_memory: false }
    }

    /// The end of a VMM: `exit` is the record of the VM's end, which one that was
    /// killed had no time for.
    async fn of_vmm(exit: Option<Exit>, cgroup: Option<&Path>, oom_kills: u64) -> Self {
        match (exit, husk_vm::out_of_memory(cgroup, oom_kills).await) {
            (Some(exit), _) => Self::of(husk_vm::Error::from(exit).to_string()),
            (None, Some(problem)) => Self { problem, out_of_memory: true },
            (None, None) => Self::of("the machine's VMM was killed"),
        }
    }
}

/// A pod's backend failed. The text says the stage first; a cause is the
/// [source](std::error::Error::source).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VM failed.
    #[error(transparent)]
    Vm(#[from] husk_vm::Error),
    /// The supervisor of host containers failed.
    #[error(transparent)]
    Host(#[from] husk_hostpod::Error),
    /// The VM's writable disk cannot be made.
    #[error(transparent)]
    Disk(#[from] husk_vm::DiskError),
    /// CNI, the network namespace or a tap failed.
    #[error("network")]
    Network(#[from] husk_network::Error),
    /// A volume cannot be mounted or unmounted.
    #[error(transparent)]
    Volume(#[from] husk_volumes::Error),
    /// The pod's configuration cannot be had.
    #[error(transparent)]
    Spec(#[from] husk_oci::Error),
    /// The programs of a handler's hooks cannot be read.
    #[error(transparent)]
    Hooks(#[from] husk_oci::hooks::Error),
    /// A container's AppArmor profile cannot be had.
    #[error(transparent)]
    AppArmor(#[from] husk_oci::apparmor::Error),
    /// The kernel gives no random numbers.
    #[error("draw a seed for the machine's random numbers: getrandom")]
    Seed(#[source] std::io::Error),
    /// The scope of systemd that is the pod's control group cannot be had.
    #[error(transparent)]
    Systemd(#[from] husk_systemd::Error),
    /// A file of the host could not be opened or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The pod or the node is in a state that forbids it.
    #[error("{0}")]
    WrongState(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_vmm_that_the_kernel_killed_for_want_of_memory_is_told_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let ending = async |before| Ending::of_vmm(None, Some(folder.path()), before).await;
        let killed = Ending::of("the machine's VMM was killed");
        assert_eq!(ending(0).await, killed);
        let events = folder.path().join("memory.events");
        std::fs::write(&events, "low 0\nhigh 0\nmax 3\noom 2\noom_kill 0\noom_group_kill 0\n").unwrap();
        assert_eq!(ending(0).await, killed);
        std::fs::write(&events, "max 3\noom 2\noom_kill 1\noom_group_kill 0\n").unwrap();
        let ended = ending(0).await;
        assert!(ended.out_of_memory && ended.problem.contains("memory on the node ran out"));
        // A kill before the pod was ready has not ended it.
        assert_eq!(ending(1).await, killed);
        assert_eq!(Ending::of_vmm(None, None, 0).await, killed);
    }
}
