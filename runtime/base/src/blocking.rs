//! File calls beside the async workers.

use std::panic::resume_unwind;

/// Makes calls that may block, on a thread of their own, and returns their result. A disk
/// that holds up a worker would hold up every task of huskd. The calls run to their end,
/// also when nobody waits for them any more, and their log lines are in the caller's span.
///
/// # Panics
/// When the calls do.
pub async fn blocking<T: Send + 'static>(calls: impl FnOnce() -> T + Send + 'static) -> T {
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(calls)).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The runtime has shut down, and every task ends with it.
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_that_blocks_holds_up_no_worker() {
        let (release, released) = std::sync::mpsc::channel();
        let call = tokio::spawn(blocking(move || released.recv()));
        // The one worker of this runtime gets here while the call blocks.
        tokio::task::yield_now().await;
        assert!(!call.is_finished());
        release.send(7).unwrap();
        assert_eq!(call.await.unwrap(), Ok(7));
    }

    #[tokio::test]
    async fn a_panic_is_the_callers() {
        let call = tokio::spawn(blocking(|| panic!("on purpose")));
        assert!(call.await.unwrap_err().is_panic());
    }
}
