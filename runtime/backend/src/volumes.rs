//! Mounts of volumes where only the file server of a VM sees them.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use husk_base::blocking;
use husk_proto::agent::UserNamespace;
use husk_vm::file_server;
use husk_volumes::{Prepared, SharedDir, Volume};

use crate::{Backend, Error, Place, RunningPod};

/// The program that serves the volumes of a handler's pods.
#[derive(Debug)]
pub struct FileServer<'a> {
    /// The handler's name.
    pub handler: &'a str,
    /// The ids that files of the pod may have; none for any.
    pub users: Option<UserNamespace>,
    /// The `husk-fs` program; none if the configuration has no such handler any more.
    pub program: Option<&'a Path>,
}

/// The mounts that a VM's file server sees.
#[derive(Debug)]
pub struct VolumeMounts {
    shared: SharedDir,
    namespace: OwnedFd,
}

impl VolumeMounts {
    /// Mounts volumes, those that are not synced into the VM nor `in_use` already. This
    /// blocks, for as long as the file system of a volume does not answer.
    ///
    /// # Errors
    /// The error names what could not be done.
    pub fn add(&self, prepared: &[Prepared], in_use: &[Volume]) -> Result<(), Error> {
        Ok(self.shared.bind(self.namespace.as_fd(), prepared, in_use)?)
    }
}

impl Place {
    /// The mounts of a VM's volumes; the first call for a pod starts its file server.
    /// `None` for a host pod, whose containers have the host's files anyhow.
    ///
    /// # Errors
    /// The error names what could not be done.
    pub async fn volume_mounts(
        &self,
        running: &RunningPod,
        server: FileServer<'_>,
    ) -> Result<Option<VolumeMounts>, Error> {
        let Backend::Vm(vmm) = &running.backend else { return Ok(None) };
        let program = server.program.ok_or_else(|| {
            Error::WrongState(format!("the configuration has no handler `{}` any more", server.handler))
        })?;
        let shared = SharedDir::of(&self.base, &self.id);
        let shared = blocking(move || shared.open().map(|()| shared)).await?;
        let plan = file_server::Plan {
            id: &self.id,
            program,
            root: shared.path(),
            run_dir: &self.run_dir,
            cgroup: self.cgroup.clone(),
            trusted: husk_volumes::TRUSTED,
            users: server.users,
        };
        file_server::ensure(&vmm.control, plan).await?;
        let run_dir = self.run_dir.clone();
        let namespace = blocking(move || file_server::namespace(&run_dir)).await?;
        let ended = || Error::WrongState("the pod's file server has ended: restart the pod".into());
        Ok(Some(VolumeMounts { shared, namespace: namespace.ok_or_else(ended)? }))
    }

    /// Unmounts the volumes with these names.
    ///
    /// # Errors
    /// The error names what could not be done; it can be repeated.
    pub async fn release_volumes(&self, names: Vec<String>) -> Result<(), Error> {
        let shared = SharedDir::of(&self.base, &self.id);
        let run_dir = self.run_dir.clone();
        blocking(move || {
            let namespace = file_server::namespace(&run_dir)?;
            for name in names {
                shared.release(namespace.as_ref().map(AsFd::as_fd), &name)?;
            }
            Ok(())
        })
        .await
    }

    /// Removes what is left of volumes of a pod that has ended: its file server has
    /// gone with it.
    ///
    /// # Errors
    /// The error names what could not be done.
    pub async fn close_volumes(&self) -> Result<(), Error> {
        let shared = SharedDir::of(&self.base, &self.id);
        Ok(blocking(move || shared.close()).await?)
    }
}
