//! A container's log: opened with the container or when it is taken over, and
//! opened anew after rotation.

use std::path::Path;
use std::sync::Arc;

use husk_base::FileError;

use crate::model::log::LogFile;
use crate::model::{Container, Sandbox, State};
use crate::{Error, Node};

/// Opens the log of a container, if its client wants one.
///
/// # Errors
/// The disk refuses it, or does not answer.
pub(crate) async fn open_log(sandbox: &Sandbox, container: &Container) -> Result<(), Error> {
    let path = container.record().log_path.clone();
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let stage = "open container log";
    let (folder, place) = (sandbox.record().config.log_directory.clone(), path.clone());
    let position = container.position_path().to_owned();
    let open = move || LogFile::open(Path::new(&folder), &place, Some(&position));
    let opened = sandbox.lane.run(stage, open).await?;
    let log = opened.map_err(FileError::at(stage, &path))?;
    container.set_log(Some(Arc::new(log)));
    Ok(())
}

/// Has the log of a container that runs go on in a new file at its path.
///
/// # Errors
/// A container that does not run, or the disk's; the old file stays in use then.
pub async fn reopen_log(node: &Node, container_id: &str) -> Result<(), Error> {
    let (sandbox, container) = node.registry.container(container_id)?;
    let record = container.record();
    if record.state != State::Running {
        return Err(Error::WrongState(format!(
            "reopen log: container `{}` is {}",
            container.id,
            record.state.word()
        )));
    }
    if let Some(log) = container.log() {
        let stage = "reopen container log";
        let path = record.log_path.clone();
        let reopened = sandbox.lane.run(stage, move || log.reopen()).await?;
        reopened.map_err(FileError::at(stage, &path))?;
    }
    Ok(())
}
