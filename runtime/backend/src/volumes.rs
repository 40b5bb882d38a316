//! Mounts of volumes where only the file server of a VM sees them.

use std::os::fd::AsFd;
use std::path::Path;

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

impl Place {
    /// Mounts volumes for a VM, those that are not synced into it; the first one of
    /// a pod starts its file server. On the host a container has the host's files
    /// anyhow.
    ///
    /// # Errors
    /// With what could not be done.
    pub async fn mount_volumes(
        &self,
        running: &RunningPod,
        server: FileServer<'_>,
        prepared: &[Prepared],
        in_use: &[Volume],
    ) -> Result<(), Error> {
        let Backend::Vm(vmm) = &running.backend else { return Ok(()) };
        if prepared.iter().all(|one| one.volume.synced) {
            return Ok(());
        }
        let program = server.program.ok_or_else(|| {
            Error::Precondition(format!("the configuration has no handler `{}` any more", server.handler))
        })?;
        let shared = SharedDir::of(&self.base, &self.id);
        shared.open()?;
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
        let namespace = file_server::namespace(&self.run_dir)?
            .ok_or_else(|| Error::Precondition("the pod's file server has ended: restart the pod".into()))?;
        Ok(shared.bind(namespace.as_fd(), prepared, in_use)?)
    }

    /// Unmounts the volumes with these names.
    ///
    /// # Errors
    /// With what could not be done; it can be repeated.
    pub fn release_volumes<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<(), Error> {
        let shared = SharedDir::of(&self.base, &self.id);
        let namespace = file_server::namespace(&self.run_dir)?;
        for name in names {
            shared.release(namespace.as_ref().map(AsFd::as_fd), name)?;
        }
        Ok(())
    }

    /// Removes what is left of volumes of a pod that has ended: its file server has
    /// gone with it.
    ///
    /// # Errors
    /// With what could not be done.
    pub fn close_volumes(&self) -> Result<(), Error> {
        Ok(SharedDir::of(&self.base, &self.id).close()?)
    }
}
