//! Stopping a container: the stop signal, the time of grace, then SIGKILL. Of
//! several calls the one whose time is over first kills.

use std::sync::Arc;
use std::time::Duration;

use tonic::Code;

use super::ready::ready_pod;
use super::supervise;
use crate::model::{Container, LookupError, Phase, Sandbox, State, Unlocked};
use crate::{Error, Node};

/// Most time that a container gets to end after SIGKILL: as long as a disk may
/// hold a process in the kernel.
const AFTER_KILL: Duration = Duration::from_secs(30);

/// Stops a container, which has `grace` to end by itself. One that is not known or
/// does not run is stopped already.
///
/// # Errors
/// When it cannot be asked, or does not end.
pub async fn stop_container(node: &Arc<Node>, id: &str, grace: Duration) -> Result<(), Error> {
    let (sandbox, container) = match node.registry.container(id) {
        Err(LookupError::Unknown { .. }) => return Ok(()),
        found => found?,
    };
    stop(&sandbox, &container, grace).await
}

/// No lock is held while the container takes its time: whoever wants it gone
/// sooner comes in between, and the end is everyone's.
async fn stop(sandbox: &Sandbox, container: &Arc<Container>, grace: Duration) -> Result<(), Error> {
    let running = {
        let mut unlocked = Unlocked::new();
        let mut op = container.lock_op(&mut unlocked).await;
        if container.record().state != State::Running {
            return Ok(());
        }
        let running = match ready_pod(sandbox) {
            // The pod has gone, and the container with it.
            Err(_) if sandbox.record().phase != Phase::Ready => return Ok(()),
            found => found?,
        };
        // Asked once: some programs take a second signal for less patience.
        if !grace.is_zero() && !op.was_asked_to_stop() {
            let signal = container.record().stop_signal;
            supervise::signal(&running, &container.id, signal, false).await?;
            op.set_asked_to_stop();
        }
        running
    };
    if tokio::time::timeout(grace, container.wait_exited()).await.is_ok() {
        tracing::info!("container stopped");
        return Ok(());
    }
    match supervise::signal(&running, &container.id, libc::SIGKILL, true).await {
        // The container is being removed, or is already.
        Err(error) if matches!(error.status.code(), Code::FailedPrecondition | Code::NotFound) => {}
        sent => sent?,
    }
    if tokio::time::timeout(AFTER_KILL, container.wait_exited()).await.is_err() {
        return Err(Error::Timeout(format!(
            "container `{}` did not end within {} s of SIGKILL",
            container.id,
            AFTER_KILL.as_secs()
        )));
    }
    tracing::info!("container killed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use husk_agent_client::fake::Fake;

    use super::*;
    use crate::model::{Events, Exit};
    use crate::test_util::{pod_of, running};

    #[tokio::test]
    async fn a_later_call_with_less_time_does_not_wait_for_an_earlier_one() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let agent = fake.serve(folder.path(), Duration::from_secs(20)).await;
        let (sandbox, container) = running(folder.path(), "p", Events::default()).await;
        sandbox.set_running(Some(pod_of(agent)));

        let call = |grace| {
            let (sandbox, container) = (sandbox.clone(), container.clone());
            tokio::spawn(async move { stop(&sandbox, &container, Duration::from_secs(grace)).await })
        };
        let patient = call(600);
        fake.signals(1).await;
        let again = call(500);
        // A removal would find the lock free.
        {
            let mut unlocked = Unlocked::new();
            let free = container.lock_op(&mut unlocked);
            tokio::time::timeout(Duration::from_secs(20), free).await.unwrap();
        }
        let at_once = call(0);
        let signals = tokio::time::timeout(Duration::from_secs(20), fake.signals(2)).await.unwrap();
        assert_eq!(signals, [(String::new(), 15), (String::new(), 9)], "it is asked once");
        assert!(!patient.is_finished() && !at_once.is_finished());

        sandbox.container_ended(&container, Exit::reported(137, false, 1)).await;
        for call in [patient, again, at_once] {
            tokio::time::timeout(Duration::from_secs(20), call).await.unwrap().unwrap().unwrap();
        }
        assert_eq!(fake.signals(0).await.len(), 2);
    }
}
