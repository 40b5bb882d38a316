//! Waits for the end of processes. Such a call may take as long as the pod lives,
//! and the agent gives the answer once: it is asked again whenever the
//! connection breaks, for as long as something listens at the other end.

use std::io;
use std::time::Duration;

use husk_proto::agent::{WaitProcessRequest, WaitProcessResponse};
use tokio::net::UnixStream;
use tokio::time::sleep;
use tonic::{Code, Status};

use super::{Agent, Error};

/// The first pause before a wait that broke off is asked for again; each later one is twice as
/// long.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// The longest pause.
const AT_THE_LATEST: Duration = Duration::from_secs(30);

/// The stage of errors.
const WAIT: &str = "wait for process";

impl Agent {
    /// Returns once a process has ended; `process_id` is empty for a container's
    /// first one.
    ///
    /// # Errors
    /// The agent does not know the process, or has ended.
    pub async fn wait_process(
        &self,
        container_id: &str,
        process_id: &str,
    ) -> Result<WaitProcessResponse, Error> {
        let request =
            WaitProcessRequest { container_id: container_id.to_owned(), process_id: process_id.to_owned() };
        let mut pause = ASK_AGAIN;
        loop {
            let status = match self.waits.clone().wait_process(request.clone()).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            if is_final(&status) || self.has_gone().await {
                return Err(Error::of(WAIT, &status));
            }
            tracing::debug!(
                container = container_id,
                message = status.message(),
                "a wait for a process broke off; asking again"
            );
            sleep(pause).await;
            pause = (pause * 2).min(AT_THE_LATEST);
        }
    }

    /// Whether nothing listens any more at the agent's socket.
    async fn has_gone(&self) -> bool {
        let gone = |error: io::Error| {
            matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
        };
        UnixStream::connect(&self.vsock).await.is_err_and(gone)
    }
}

/// Whether asking again would bring the same answer. A container that is being
/// removed may come back if that fails.
fn is_final(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::InvalidArgument | Code::Unimplemented)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::fake::Fake;

    #[tokio::test]
    async fn a_wait_outlives_its_connection() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake { endless: true, exit_code: 3, ..Fake::default() });
        let agent = fake.serve(folder.path(), Duration::from_secs(20)).await;
        let waiting = tokio::spawn(async move { agent.wait_process("c", "").await });
        for _ in 0..3 {
            sleep(Duration::from_millis(300)).await;
            assert!(!waiting.is_finished());
            fake.broken.send_replace(());
        }
        fake.killed.send_replace(true);
        let end = tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap().unwrap();
        assert_eq!(end.exit_code, 3);
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_agent() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake { endless: true, ..Fake::default() });
        let agent = fake.serve(folder.path(), Duration::from_secs(20)).await;
        let waiting = tokio::spawn(async move { agent.wait_process("c", "").await });
        sleep(Duration::from_millis(100)).await;
        std::fs::remove_file(folder.path().join("vsock")).unwrap();
        fake.broken.send_replace(());
        tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap().unwrap_err();
    }
}
