//! Follows a container from its creation to its end: its output into its log,
//! its end into its record.

use std::sync::Arc;

use husk_agent_client as agent;
use husk_backend::RunningPod;
use husk_base::id::ContainerId;
use husk_proto::agent::SignalProcessRequest;
use tracing::Instrument;

use super::capture::{Capture, Rest};
use crate::model::{Container, Exit, Sandbox};

/// Starts to follow a container that the agent has made. Its output streams
/// are open when this returns.
///
/// # Errors
/// A stream that cannot be opened.
pub(crate) async fn follow(
    sandbox: &Arc<Sandbox>,
    running: &Arc<RunningPod>,
    container: &Arc<Container>,
) -> std::io::Result<()> {
    let output = Capture::start(&running.agent, container).await?;
    let end = await_end(sandbox.clone(), running.clone(), container.clone(), output);
    tokio::spawn(end.instrument(container.span()));
    Ok(())
}

/// As [`follow`], for a container that an earlier huskd followed: output that
/// cannot be had at once is asked for again.
pub(crate) async fn resume(sandbox: &Arc<Sandbox>, running: &Arc<RunningPod>, container: &Arc<Container>) {
    let output = Capture::resume(&running.agent, container).await;
    let end = await_end(sandbox.clone(), running.clone(), container.clone(), output);
    tokio::spawn(end.instrument(container.span()));
}

/// Tells whoever is attached that the output has ended, whyever it is not
/// followed any more.
struct End(Arc<Container>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.output.end();
    }
}

/// Whoever watches the machine records the end of its containers when it ends:
/// then there is nothing left to wait for.
async fn await_end(
    sandbox: Arc<Sandbox>,
    running: Arc<RunningPod>,
    container: Arc<Container>,
    output: Capture,
) {
    let _end = End(container.clone());
    let ended = tokio::select! {
        ended = running.agent.wait_process(container.id.as_str(), "") => Some(ended),
        () = container.wait_exited() => None,
    };
    // The log does not wait for attached clients any more.
    container.output.hurry();
    let kept = matches!(&ended, Some(Ok(end)) if end.output_kept);
    if !output.finish(if kept { Rest::Kept } else { Rest::None }).await {
        tracing::warn!("output did not end with the container: the rest is lost");
    }
    match ended {
        Some(Ok(end)) => {
            let exit = Exit::reported(end.exit_code, end.oom_killed, end.finished_at_unix_nanos);
            sandbox.container_ended(&container, exit).await;
        }
        Some(Err(error)) if error.status.code() == tonic::Code::NotFound => {
            let exit = Exit::unknown("the agent in the pod does not know this container any more");
            sandbox.container_ended(&container, exit).await;
        }
        Some(Err(error)) => tracing::debug!(%error, "failed to wait for the end of a container"),
        None => {}
    }
}

/// Sends a signal to a container's init, or to all its processes.
///
/// # Errors
/// The agent refuses it.
pub(crate) async fn signal(
    running: &RunningPod,
    id: &ContainerId,
    signal: i32,
    all: bool,
) -> Result<(), agent::Error> {
    let request = SignalProcessRequest {
        container_id: id.to_string(),
        process_id: String::new(),
        signal: signal.unsigned_abs(),
        all,
    };
    running
        .agent
        .call("signal container", async |mut agent| agent.signal_process(request).await)
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use husk_agent_client::fake::Fake;

    use super::*;
    use crate::model::Events;
    use crate::model::fanout::SEND_TIMEOUT;
    use crate::model::log::LogFile;
    use crate::test_util::{pod_of, running};

    /// Sooner than anybody is late.
    const SOON: Duration = SEND_TIMEOUT.saturating_sub(Duration::from_secs(1));

    #[tokio::test]
    async fn the_end_of_the_log_does_not_wait_for_who_is_attached() {
        let folder = tempfile::tempdir().unwrap();
        let mut said = b"0123456789abcde\n".repeat(50_000);
        said.extend_from_slice(b"last");
        let fake = Arc::new(Fake { stdout: said.clone(), endless: true, ..Fake::default() });
        let pod = pod_of(fake.serve(folder.path(), Duration::from_secs(20)).await);
        let (sandbox, container) = running(folder.path(), "p", Events::default()).await;
        let path = folder.path().join("0.log");
        container.set_log(Some(Arc::new(LogFile::open(folder.path(), &path, None).unwrap())));
        let mut attached = container.output.stdout.subscribe();
        follow(&sandbox, &pod, &container).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        fake.killed.send_replace(true);
        tokio::time::timeout(SOON, container.wait_exited()).await.unwrap();
        let logged = std::fs::read_to_string(&path).unwrap();
        assert_eq!(logged.lines().count(), 50_001);
        assert!(logged.ends_with("stdout P last\n"));
        let mut heard = Vec::new();
        while let Some(bytes) = tokio::time::timeout(SOON, attached.next()).await.unwrap() {
            heard.extend_from_slice(&bytes);
        }
        assert!(heard == said && !attached.was_dropped(), "{} bytes", heard.len());
    }

    #[tokio::test]
    async fn who_is_attached_to_output_that_is_lost_is_told_of_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake { without_streams: true, endless: true, ..Fake::default() });
        let pod = pod_of(fake.serve(folder.path(), Duration::from_secs(20)).await);
        let (sandbox, container) = running(folder.path(), "p", Events::default()).await;
        resume(&sandbox, &pod, &container).await;
        let (mut stdout, mut stderr) =
            (container.output.stdout.subscribe(), container.output.stderr.subscribe());
        fake.killed.send_replace(true);
        for attached in [&mut stdout, &mut stderr] {
            assert_eq!(tokio::time::timeout(SOON, attached.next()).await.unwrap(), None);
        }
        tokio::time::timeout(SOON, container.wait_exited()).await.unwrap();
    }
}
