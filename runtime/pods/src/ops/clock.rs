//! Keeps the wall clock of a machine at the host's. A guest's kernel knows how
//! much time passes as its processor counts it, but not that the host's clock
//! was set, or is being corrected all the time, as NTP does.

use std::convert::Infallible;
use std::time::Duration;

use husk_agent_client::Agent;
use husk_base::now;
use husk_proto::agent::AdjustClockRequest;
use tokio::time::{Instant, sleep, timeout};

/// How often they are compared.
const EVERY: Duration = Duration::from_secs(30);

/// Most time that the agent gets for an answer. A later one says little.
const AGENT_LIMIT: Duration = Duration::from_secs(5);

/// So far apart they may be, nanoseconds.
const NEAR_ENOUGH: i64 = 10_000_000;

/// Compares and corrects for as long as it is polled.
pub(crate) async fn keep(agent: &Agent) -> Infallible {
    loop {
        sleep(EVERY).await;
        if let Err(status) = compare(agent).await {
            tracing::debug!(message = status.message(), "compare a machine's clock with the host's");
        }
    }
}

async fn compare(agent: &Agent) -> Result<(), tonic::Status> {
    let (asked_at, asked) = (now(), Instant::now());
    let guest = adjust(agent, 0).await?;
    if let Some(by_nanos) = correction(asked_at, asked.elapsed(), guest) {
        tracing::debug!(by_nanos, "correct a machine's clock");
        adjust(agent, by_nanos).await?;
    }
    Ok(())
}

async fn adjust(agent: &Agent, by_nanos: i64) -> Result<i64, tonic::Status> {
    let mut agent = agent.unlimited();
    let answer = timeout(AGENT_LIMIT, agent.adjust_clock(AdjustClockRequest { by_nanos })).await;
    let answer = answer.map_err(|_| tonic::Status::deadline_exceeded("no answer in time"))?;
    Ok(answer?.into_inner().time_unix_nanos)
}

/// The nanoseconds by which to move a guest's clock that showed `guest` at some
/// moment between the question and the answer; `None` if the clock may be right.
fn correction(asked_at: i64, took: Duration, guest: i64) -> Option<i64> {
    let half = i64::try_from(took.as_nanos() / 2).unwrap_or(i64::MAX);
    let behind = asked_at.saturating_add(half).saturating_sub(guest);
    let certain = half.saturating_add(NEAR_ENOUGH).unsigned_abs();
    (behind.unsigned_abs() > certain).then_some(behind)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use husk_agent_client::fake::Fake;
    use husk_base::lock;

    use super::*;

    #[tokio::test]
    async fn a_clock_that_is_wrong_is_set_right() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let agent = fake.serve(folder.path(), Duration::from_secs(20)).await;
        compare(&agent).await.unwrap();
        let wrong = now() - *lock(&fake.clock);
        assert!((0..2_000_000_000).contains(&wrong), "{wrong} ns");
    }

    #[test]
    fn only_what_cannot_be_the_answers_own_time_is_corrected() {
        const MS: i64 = 1_000_000;
        let asked_at = 1_800_000_000_000 * MS;
        let took = Duration::from_millis(40);
        assert_eq!(correction(asked_at, took, asked_at + 20 * MS), None);
        assert_eq!(correction(asked_at, took, asked_at - 9 * MS), None);
        assert_eq!(correction(asked_at, took, asked_at + 49 * MS), None);
        assert_eq!(correction(asked_at, took, asked_at + 60 * MS), Some(-40 * MS));
        assert_eq!(correction(asked_at, took, asked_at - 3_600_000 * MS), Some(3_600_020 * MS));
        // A guest may say anything.
        assert_eq!(correction(asked_at, took, i64::MIN), Some(i64::MAX));
        assert!(correction(asked_at, took, i64::MAX).is_some());
    }
}
