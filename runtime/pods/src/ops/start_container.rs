//! Starting a container.

use std::sync::Arc;

use husk_backend::RunningPod;
use husk_base::{chain, now};
use husk_proto::agent;

use super::ready::ready_pod;
use super::{supervise, vm_memory};
use crate::model::{Container, ContainerOp, EventKind, Exit, Sandbox, State, Unlocked};
use crate::{Error, Node};

/// Exit code of a container whose program never ran, as shells and other
/// runtimes have it.
const CANNOT_START: i32 = 128;

/// Starts a container that was created.
///
/// # Errors
/// One in another state, or whose program cannot be started; it has ended then.
pub async fn start_container(node: &Arc<Node>, id: &str) -> Result<(), Error> {
    let (sandbox, container) = node.registry.container(id)?;
    let mut unlocked = Unlocked::new();
    let container = container.lock_op(&mut unlocked).await;
    let record = container.record();
    if record.state != State::Created {
        return Err(Error::WrongState(format!(
            "container `{}` is {}, and only a created one can be started",
            container.id,
            record.state.word()
        )));
    }
    let running = ready_pod(&sandbox)?;
    let started_at = now();
    // The container may run to its end before the agent's answer is here, so it counts as
    // running from now on.
    container
        .update(|record| {
            record.state = State::Running;
            record.started_at = started_at;
        })
        .await?;
    if let Err(error) = start(&running, &container).await {
        let error = vm_memory::explain(&sandbox, &running, error).await;
        give_up(&sandbox, &running, &container, &error).await;
        return Err(error);
    }
    sandbox.send_event(container.id.as_str(), EventKind::Started);
    tracing::info!("container started");
    Ok(())
}

async fn start(running: &RunningPod, container: &ContainerOp<'_>) -> Result<(), Error> {
    let known = &container.record().start_error;
    if !known.is_empty() {
        return Err(Error::WrongState(format!("start container: {known}")));
    }
    Ok(ask(running, container).await?)
}

async fn ask(running: &RunningPod, container: &Container) -> Result<(), husk_agent_client::Error> {
    let request = agent::StartContainerRequest { container_id: container.id.to_string() };
    running.agent.call("start container", async |mut agent| agent.start_container(request).await).await?;
    Ok(())
}

/// Ends a container that was not started, or not in time: it must not run all the
/// same, for its client will start another in its place.
async fn give_up(sandbox: &Sandbox, running: &RunningPod, container: &Container, error: &Error) {
    let never_made = !container.record().start_error.is_empty();
    if !never_made
        && let Err(error) = supervise::signal(running, &container.id, libc::SIGKILL, true).await
        && error.status.code() != tonic::Code::NotFound
    {
        tracing::warn!(%error, "failed to end a container that could not be started; it counts as running");
        return;
    }
    let exit =
        Exit { code: CANNOT_START, finished_at: now(), reason: "StartError".into(), message: chain(error) };
    sandbox.container_ended(container, exit).await;
}

/// Starts a container that counts as running, if an earlier huskd ended before
/// it had said so to the agent. Of any other the agent says that it was started.
pub(crate) async fn catch_up(sandbox: &Sandbox, running: &RunningPod, container: &Container) {
    match ask(running, container).await {
        Ok(()) => {
            tracing::info!("started a container that an earlier huskd was about to start")
        }
        Err(error) => match error.status.code() {
            tonic::Code::FailedPrecondition | tonic::Code::NotFound => {}
            tonic::Code::Internal if !error.lost => give_up(sandbox, running, container, &error.into()).await,
            _ => tracing::warn!(%error, "failed to see whether a container was started"),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use husk_agent_client::fake::Fake;
    use husk_base::lock;
    use tonic::Code;

    use super::*;
    use crate::model::Events;
    use crate::test_util::{pod_of, running};

    /// Where a container is that counts as running, once huskd has caught up with
    /// an agent that refuses so, and whether it was killed.
    async fn caught_up(refusals: Vec<Code>) -> (State, bool) {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake { refusals: refusals.into(), ..Default::default() });
        let pod = pod_of(fake.serve(folder.path(), Duration::from_secs(20)).await);
        let (sandbox, container) = running(folder.path(), "s", Events::default()).await;
        catch_up(&sandbox, &pod, &container).await;
        let killed = *lock(&fake.signals) == [(String::new(), libc::SIGKILL.unsigned_abs())];
        (container.record().state.clone(), killed)
    }

    #[tokio::test]
    async fn a_container_that_was_about_to_start_is_started_and_what_fails_then_does_not_run() {
        assert_eq!(caught_up(vec![]).await, (State::Running, false));
        assert_eq!(caught_up(vec![Code::FailedPrecondition]).await, (State::Running, false));
        assert_eq!(caught_up(vec![Code::Unavailable]).await, (State::Running, false));
        let (state, killed) = caught_up(vec![Code::Internal]).await;
        assert!(matches!(&state, State::Exited(exit) if exit.code == CANNOT_START), "{state:?}");
        assert!(killed);
    }
}
