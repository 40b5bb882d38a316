//! File calls on paths that clients name: volumes of the host, folders of logs.
//!
//! Such a path may lie on a file system whose server never answers (NFS, FUSE), and
//! a call on it then never returns. So it runs on a thread of its own, is waited for
//! only so long, and each pod has only so many: a pod with such a volume waits, and
//! nothing else of the node does.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// How many file calls a pod has under way at a time.
const WIDTH: usize = 4;

/// How long a file call is waited for, the wait for its turn included.
const DEADLINE: Duration = Duration::from_secs(30);

/// The reason for which there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoResult {
    /// Neither this call nor one before it returned in time.
    #[error(
        "a file system of the host did not answer within {0} s: see whether the servers of the pod's volumes and of \
         its log directory (NFS, FUSE) run"
    )]
    Late(u64),
    /// Earlier calls have not returned yet.
    #[error("a file system of the host has not answered earlier calls yet")]
    Busy,
    /// The call panicked, or huskd ends.
    #[error("the call broke off")]
    Broken,
}

/// A call without a result, and the stage that it was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{stage}: {why}")]
pub struct Failed {
    /// The stage, as the client reads it.
    pub stage: &'static str,
    /// The reason for which there is no result.
    pub why: NoResult,
}

/// The file calls of one pod.
#[derive(Clone, Debug)]
pub struct Lane {
    turns: Arc<Semaphore>,
    deadline: Duration,
}

impl Default for Lane {
    fn default() -> Self {
        Self::new(WIDTH, DEADLINE)
    }
}

impl Lane {
    /// A lane for `width` calls at a time, each of which has to return by `deadline`.
    pub fn new(width: usize, deadline: Duration) -> Self {
        Self { turns: Arc::new(Semaphore::new(width)), deadline }
    }

    /// Runs `call`, and returns its result. A call that is given up goes on in its
    /// thread, and takes up one of the pod's turns until the kernel lets it return.
    ///
    /// # Errors
    /// The call, or those before it, did not return in time.
    pub async fn run<T: Send + 'static>(
        &self,
        stage: &'static str,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Failed> {
        let turns = self.turns.clone();
        let called = async {
            let turn = turns.acquire_owned().await.map_err(|_| NoResult::Broken)?;
            in_thread(turn, call).await
        };
        self.in_time(called).await.map_err(|why| Failed { stage, why })
    }

    /// As [`Lane::run`], but at once or not at all: whoever asks often does not wait
    /// each time for what does not answer.
    ///
    /// # Errors
    /// The call has no turn, or did not return in time.
    pub async fn run_now<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NoResult> {
        let turn = self.turns.clone().try_acquire_owned().map_err(|_| NoResult::Busy)?;
        self.in_time(in_thread(turn, call)).await
    }

    async fn in_time<T>(&self, called: impl Future<Output = Result<T, NoResult>>) -> Result<T, NoResult> {
        let late = |_| NoResult::Late(self.deadline.as_secs());
        timeout(self.deadline, called).await.map_err(late)?
    }
}

/// Makes a call on a thread where it may block, and keeps its turn until it returns.
async fn in_thread<T: Send + 'static>(
    turn: OwnedSemaphorePermit,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NoResult> {
    let span = tracing::Span::current();
    let call = move || {
        let result = span.in_scope(call);
        drop(turn);
        result
    };
    tokio::task::spawn_blocking(call).await.map_err(|_| NoResult::Broken)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    /// A call that returns when the sender is dropped.
    fn hung(until: Receiver<()>) -> impl FnOnce() + Send + 'static {
        move || {
            let _ = until.recv();
        }
    }

    #[tokio::test]
    async fn calls_that_never_return_cost_their_own_pod_alone() {
        let (pod, other) = (Lane::new(2, Duration::from_millis(100)), Lane::new(2, DEADLINE));
        let mut holders = Vec::new();
        for _ in 0..2 {
            let (holder, until) = channel();
            holders.push(holder);
            let error = pod.run("open volume", hung(until)).await.unwrap_err();
            assert_eq!((error.stage, error.why), ("open volume", NoResult::Late(0)));
        }
        // The turns are taken: not even a call that would return is begun.
        pod.run("open volume", || panic!("there is no turn for this call")).await.unwrap_err();
        assert_eq!(pod.run_now(|| ()).await, Err(NoResult::Busy));
        assert_eq!(other.run("open volume", || 7).await.unwrap(), 7);
        // Once the server answers, the pod goes on.
        drop(holders);
        let went_on = async { while pod.run("open volume", || ()).await.is_err() {} };
        timeout(DEADLINE, went_on).await.unwrap();
        assert_eq!(pod.run_now(|| 8).await, Ok(8));
    }
}
