//! A pod by what its record says of it, whether or not anything of it runs.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_base::id::{ContainerId, SandboxId};
use husk_base::{FileError, cgroup, chain, dirs};
use husk_config::{Handler, HostHandler, Kind};
use husk_oci::apparmor::{self, Confinement};
use husk_oci::{HostPod, choose_cpus};
use husk_proto::cri;
use oci_spec::runtime::LinuxResources;

use crate::{Backend, Ending, Error, ImageDisks, RunningPod};

/// Where a pod is on its node, and what it runs in if it runs.
#[derive(Clone, Debug)]
pub struct Place {
    pub(crate) id: SandboxId,
    pub(crate) kind: Kind,
    /// The run directory of huskd.
    pub(crate) base: PathBuf,
    /// The pod's own, below it.
    pub(crate) run_dir: PathBuf,
    pub(crate) cgroup: Option<PathBuf>,
}

impl Place {
    /// The place of the pod `id` below huskd's run directory; `cgroup` is its
    /// control group.
    #[must_use]
    pub fn new(base: &Path, id: SandboxId, kind: Kind, cgroup: Option<PathBuf>) -> Self {
        let run_dir = dirs::sandbox_run_dir(base, &id);
        Self { id, kind, base: base.to_owned(), run_dir, cgroup }
    }

    fn host_cgroup(&self) -> Result<&Path, Error> {
        Ok(self.cgroup.as_deref().ok_or(husk_hostpod::Error::NoCgroups)?)
    }

    /// Has systemd make the pod's control group, if that is a scope. It stays for as long as
    /// there is a process in it; until the pod has its own, the answer keeps it.
    ///
    /// # Errors
    /// systemd does not make it.
    pub(crate) async fn start_scope(&self) -> Result<Option<husk_systemd::Scope>, Error> {
        let Some(cgroup) = self.cgroup.as_deref().filter(|path| husk_systemd::units(path).is_some()) else {
            return Ok(None);
        };
        let description = format!("pod {} of husk", self.id.short());
        Ok(Some(husk_systemd::start(cgroup, &description).await?))
    }

    /// Removes the pod's control group, once nothing is in it. Succeeds when there is none.
    ///
    /// # Errors
    /// The kernel's, `EBUSY` when a process stays in it.
    pub async fn remove_cgroup(&self) -> Result<(), Error> {
        let Some(cgroup) = self.cgroup.as_deref() else { return Ok(()) };
        let there = tokio::fs::try_exists(cgroup).await.unwrap_or(false);
        cgroup::remove(cgroup).await.map_err(FileError::at("remove control group", cgroup))?;
        // systemd ends a scope by itself once it is empty; this only makes it soon.
        if there && let Err(error) = husk_systemd::stop(cgroup).await {
            let error = chain(&error);
            tracing::warn!(error, "failed to stop the pod's scope; systemd ends it when it notices");
        }
        Ok(())
    }

    /// Whether its VMM or its supervisor listens. One that is slow to answer does,
    /// and one whose socket somebody has removed lives all the same.
    pub async fn lives(&self) -> bool {
        match self.kind {
            Kind::Vm => {
                husk_vm::lives(&self.run_dir).await
                    || (!husk_vm::has_socket(&self.run_dir).await && self.has_vmm_process().await)
            }
            Kind::Host => husk_hostpod::lives(&self.run_dir).await,
        }
    }

    /// Whether a VMM without a socket is among the processes.
    async fn has_vmm_process(&self) -> bool {
        self.cgroup_with_vmm().await.is_some() || husk_vm::has_process(&self.run_dir).await
    }

    /// The pod's control group, if its VMM is in it.
    async fn cgroup_with_vmm(&self) -> Option<&Path> {
        let cgroup = self.cgroup.as_deref()?;
        husk_vm::is_in_group(cgroup).await.then_some(cgroup)
    }

    /// Takes over a pod that runs already, after a restart of huskd. `image_disks`
    /// is how many a VM has, `used` the images in them.
    ///
    /// # Errors
    /// When it does not answer. Whether it lives is another question, see
    /// [`Self::lives`].
    pub async fn reattach(
        &self,
        image_disks: u8,
        used: impl IntoIterator<Item = (ContainerId, String, PathBuf)>,
        limit: Duration,
    ) -> Result<RunningPod, Error> {
        match self.kind {
            Kind::Vm => {
                let (vmm, agent) = husk_vm::reattach(&self.run_dir, limit).await?;
                let disks = ImageDisks::new(image_disks).in_use(used);
                Ok(RunningPod { backend: Backend::Vm(vmm), agent, disks })
            }
            Kind::Host => {
                let cgroup = self.host_cgroup()?;
                let (supervisor, agent) = husk_hostpod::reattach(&self.run_dir, cgroup, limit).await?;
                let disks = ImageDisks::unlimited().in_use(used);
                Ok(RunningPod { backend: Backend::Host(supervisor), agent, disks })
            }
        }
    }

    /// The end of a pod that cannot be reached: as its VMM or the kernel left word of
    /// it, or else `error`. `oom_kills` is as for [`Backend::wait`].
    pub async fn ending(&self, error: &Error, oom_kills: u64) -> Ending {
        let exit = husk_vm::exit_record(&self.run_dir).await;
        let says_why = exit.is_some();
        match Ending::of_vmm(exit, self.cgroup.as_deref(), oom_kills).await {
            ending if self.kind == Kind::Vm && (says_why || ending.out_of_memory) => ending,
            _ => Ending::of(chain(error)),
        }
    }

    /// Whether anything lives in a pod's run directory, whatever the pod was.
    pub async fn anything_lives(run_dir: &Path) -> bool {
        husk_vm::lives(run_dir).await || husk_hostpod::lives(run_dir).await
    }

    /// Ends the pod by its own socket, or, when nobody answers there, by its
    /// control group. A host pod has only that. Succeeds when there is nothing.
    ///
    /// # Errors
    /// When a process is there and does not go.
    pub async fn destroy(&self) -> Result<(), Error> {
        let cgroup = self.cgroup.as_deref();
        if self.kind == Kind::Host {
            return Ok(husk_hostpod::destroy(&self.run_dir, cgroup).await?);
        }
        if !husk_vm::has_socket(&self.run_dir).await {
            self.kill_unreachable_vmm().await?;
        }
        let Err(error) = husk_vm::destroy(&self.run_dir).await else { return Ok(()) };
        tracing::warn!(error = chain(&error), "the VMM does not end when asked; killing it");
        match cgroup.map(cgroup::kill) {
            Some(Ok(())) => Ok(husk_vm::destroy(&self.run_dir).await?),
            Some(Err(_)) | None => Err(error.into()),
        }
    }

    /// Kills a VMM that could not be asked to end, because its socket was removed.
    async fn kill_unreachable_vmm(&self) -> Result<(), Error> {
        let Some(cgroup) = self.cgroup_with_vmm().await else { return Ok(()) };
        tracing::warn!("the VMM has no socket any more; killing it");
        Ok(cgroup::kill(cgroup).map_err(FileError::at("kill the processes of the control group", cgroup))?)
    }

    /// Ends whatever runs in a pod's run directory that no record speaks of.
    ///
    /// # Errors
    /// When a process is there and does not go.
    pub async fn destroy_orphan(run_dir: &Path) -> Result<(), Error> {
        match husk_hostpod::owns(run_dir) {
            true => Ok(husk_hostpod::destroy(run_dir, None).await?),
            false => Ok(husk_vm::destroy(run_dir).await?),
        }
    }

    /// Where things of a host pod are; `None` for a VM, in which they are always at
    /// the same place.
    ///
    /// # Errors
    /// A host pod on a node without control groups.
    pub fn host_pod(&self) -> Result<Option<HostPod>, Error> {
        if self.kind == Kind::Vm {
            return Ok(None);
        }
        let cgroup = self.host_cgroup()?.to_owned();
        Ok(Some(HostPod { directory: self.run_dir.clone(), cgroup }))
    }

    /// A container's AppArmor profile, and what its VM needs for it. `others` are
    /// the configurations of the pod's other containers.
    ///
    /// # Errors
    /// A profile that cannot be had.
    pub fn confinement(
        &self,
        config: &cri::ContainerConfig,
        others: &[cri::ContainerConfig],
        handler: Option<&Handler>,
    ) -> Result<Confinement, Error> {
        let kernel = apparmor::Kernel::default();
        if self.kind == Kind::Vm {
            return Ok(apparmor::in_machine(&kernel, config, others)?);
        }
        let policy = handler.and_then(Handler::host).map(|handler| handler.apparmor_policy.clone());
        let policy = policy.unwrap_or_else(|| HostHandler::default().apparmor_policy);
        Ok(apparmor::on_host(&kernel, config, &policy)?)
    }

    /// Adds the CPUs that a container asks for to its own limits, where it has a
    /// control group on the host. Those of a VM are the whole pod's, see
    /// [`Self::pin`].
    pub fn choose_cpus(&self, limits: &mut LinuxResources, asked: &cri::LinuxContainerResources) {
        if self.kind == Kind::Host {
            choose_cpus(limits, asked);
        }
    }

    /// Gives a VMM and its file server this OOM score. Containers of the host have
    /// scores of their own.
    ///
    /// # Errors
    /// The kernel refuses it: huskd may not lower the score to this.
    pub fn set_oom_score(&self, score: i64) -> io::Result<()> {
        match (self.kind, &self.cgroup) {
            (Kind::Vm, Some(cgroup)) => cgroup::set_oom_score(cgroup, score),
            _ => Ok(()),
        }
    }

    /// Gives a VMM the CPUs and memory nodes that the lists name. Numbers of the
    /// host's CPUs mean nothing inside a VM; the containers of a host pod have
    /// control groups, and CPUs, of their own.
    ///
    /// # Errors
    /// When a list names some and the host does not give them.
    pub fn pin(&self, cpus: &str, mems: &str) -> Result<(), Error> {
        if self.kind == Kind::Host {
            return Ok(());
        }
        for (file, list) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
            let Some(cgroup) = &self.cgroup else {
                if list.is_empty() {
                    continue;
                }
                return Err(Error::WrongState(
                    "cpuset_cpus, cpuset_mems: the host has no control groups (version 2) to pin a pod with"
                        .into(),
                ));
            };
            let set = cgroup::set_list(cgroup, file, list);
            if !list.is_empty() {
                set.map_err(FileError::at("pin the pod to CPUs of the host", &cgroup.join(file)))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_vmm_whose_socket_was_removed_lives_and_can_be_ended() {
        let folder = tempfile::tempdir().unwrap();
        let (program, cgroup) = (folder.path().join("husk-vmm"), folder.path().join("group"));
        fs::create_dir(&cgroup).unwrap();
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let mut vmm = Command::new(&program).arg("600").spawn().unwrap();
        fs::write(cgroup.join("cgroup.procs"), format!("{}\n{}\n", std::process::id(), vmm.id())).unwrap();
        let place = Place::new(folder.path(), SandboxId::random(), Kind::Vm, Some(cgroup.clone()));
        fs::create_dir_all(&place.run_dir).unwrap();
        let lives = place.lives().await;
        let destroyed = place.destroy().await;
        vmm.kill().unwrap();
        vmm.wait().unwrap();
        assert!(lives);
        destroyed.unwrap();
        assert_eq!(fs::read_to_string(cgroup.join("cgroup.kill")).unwrap(), "1");
        assert!(!place.lives().await);
    }
}
