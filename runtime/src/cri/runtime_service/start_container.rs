//! StartContainer.

use std::sync::Arc;

use husk_proto::agent;
use husk_proto::cri::{StartContainerRequest, StartContainerResponse};

use super::create_container::ready_machine;
use crate::container::{Container, Exit, State, now, supervise};
use crate::cri::error::Error;
use crate::events::EventKind;
use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::vm::Machine;

/// Exit code of a container whose program never ran, as shells and other
/// runtimes have it.
const CANNOT_START: i32 = 128;

pub(super) async fn start_container(
    node: &Arc<Node>,
    request: StartContainerRequest,
) -> Result<StartContainerResponse, Error> {
    let (sandbox, container) = node.registry.container(&request.container_id)?;
    let _verb = container.verb.lock().await;
    let state = container.state();
    if state != State::Created {
        return Err(Error::FailedPrecondition(format!(
            "container `{}` is {}, and only a created one can be started",
            container.id,
            state.word()
        )));
    }
    let machine = ready_machine(&sandbox)?;
    let started_at = now();
    // It may run to its end before the agent's answer is here, so it counts as
    // running from now on.
    container.update(|record| {
        record.state = State::Running;
        record.started_at = started_at;
    })?;
    if let Err(error) = start(&machine, &container).await {
        give_up(&sandbox, &machine, &container, &error).await;
        return Err(error);
    }
    sandbox.send_event(container.id.as_str(), EventKind::Started);
    tracing::info!(container = %container.id, "container started");
    Ok(StartContainerResponse {})
}

async fn start(machine: &Machine, container: &Container) -> Result<(), Error> {
    let known = container.record().start_error.clone();
    if !known.is_empty() {
        return Err(Error::FailedPrecondition(format!("start container: {known}")));
    }
    Ok(ask(machine, container).await?)
}

async fn ask(machine: &Machine, container: &Container) -> Result<(), crate::agent::Error> {
    let request = agent::StartContainerRequest { container_id: container.id.to_string() };
    machine.agent.call("start container", async |mut agent| agent.start_container(request).await).await?;
    Ok(())
}

/// What was not started, or not in time, shall not run all the same: its client
/// will start another in its place.
async fn give_up(sandbox: &Sandbox, machine: &Machine, container: &Container, error: &Error) {
    let never_made = !container.record().start_error.is_empty();
    if !never_made
        && let Err(error) = supervise::signal(machine, &container.id, libc::SIGKILL, true).await
        && error.status.code() != tonic::Code::NotFound
    {
        tracing::warn!(container = %container.id, %error, "end what could not be started; it counts as running");
        return;
    }
    let exit = Exit {
        code: CANNOT_START,
        finished_at: now(),
        reason: "StartError".into(),
        message: error.to_string(),
    };
    sandbox.container_ended(container, exit);
}

/// Starts a container that counts as running, if an earlier huskd ended before
/// it had said so to the agent. Of any other the agent says that it was started.
pub async fn catch_up(sandbox: &Sandbox, machine: &Machine, container: &Container) {
    match ask(machine, container).await {
        Ok(()) => {
            tracing::info!(container = %container.id, "started what an earlier huskd was about to start")
        }
        Err(error) => match error.status.code() {
            tonic::Code::FailedPrecondition | tonic::Code::NotFound => {}
            tonic::Code::Internal if !error.lost => give_up(sandbox, machine, container, &error.into()).await,
            _ => tracing::warn!(container = %container.id, %error, "see whether a container was started"),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use tonic::Code;

    use super::*;
    use crate::agent::fake::Fake;
    use crate::events::Events;
    use crate::sandbox::lock;
    use crate::sandbox::tests::{machine, running};

    /// Where a container is that counts as running, once huskd has caught up with
    /// an agent that refuses so, and whether it was killed.
    async fn caught_up(refusals: Vec<Code>) -> (State, bool) {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake { refusals: refusals.into(), ..Default::default() });
        let machine = machine(fake.serve(folder.path(), Duration::from_secs(20)).await);
        let (sandbox, container) = running(folder.path(), "s", Events::default());
        catch_up(&sandbox, &machine, &container).await;
        let killed = *lock(&fake.signals) == [(String::new(), libc::SIGKILL.unsigned_abs())];
        (container.state(), killed)
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
