//! A container's log after rotation.

use crate::model::State;
use crate::{Error, Node};

/// Has the log of a container that runs go on in a new file at its path.
///
/// # Errors
/// A container that does not run, or the disk's; the old file stays in use then.
pub fn reopen_log(node: &Node, container_id: &str) -> Result<(), Error> {
    let (_, container) = node.registry.container(container_id)?;
    let state = container.state();
    if state != State::Running {
        return Err(Error::FailedPrecondition(format!(
            "reopen log: container `{}` is {}",
            container.id,
            state.word()
        )));
    }
    if let Some(log) = container.log() {
        let path = container.record().log_path.clone();
        log.reopen().map_err(|cause| Error::File { stage: "reopen container log", path, cause })?;
    }
    Ok(())
}
