//! Pauses between tries of work that nobody else would come back to.

use std::time::Duration;

/// The first pause. Each later one is twice as long.
pub(super) const FIRST: Duration = Duration::from_secs(1);

/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// The pauses between the tries of one piece of work.
#[derive(Debug)]
pub(super) struct Pauses(Duration);

impl Pauses {
    /// Begins with the first pause.
    pub(super) const fn new() -> Self {
        Self(FIRST)
    }

    /// Waits until it is time for the next try.
    pub(super) async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(LONGEST);
    }
}
