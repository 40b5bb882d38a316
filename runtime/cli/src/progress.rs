//! Shows on a terminal what takes time, while it goes on.

use std::io::{IsTerminal, Write};
use std::time::Duration;

/// The time between two pictures.
const TICK: Duration = Duration::from_millis(100);

const PICTURES: [char; 4] = ['-', '\\', '|', '/'];

/// Waits for `work`, and shows `stage` with a spinner meanwhile, if the standard error is a
/// terminal. The line is gone afterwards.
pub async fn stage<T>(stage: &str, work: impl Future<Output = T>) -> T {
    if !std::io::stderr().is_terminal() {
        return work.await;
    }
    let began = tokio::time::Instant::now();
    let mut ticks = tokio::time::interval(TICK);
    tokio::pin!(work);
    for picture in PICTURES.iter().cycle() {
        tokio::select! {
            biased;
            done = &mut work => {
                show("");
                return done;
            }
            _ = ticks.tick() => show(&format!("{picture} {stage} ({} s)", began.elapsed().as_secs())),
        }
    }
    work.await
}

fn show(line: &str) {
    let mut to = std::io::stderr().lock();
    let _ = write!(to, "\r\x1b[K{line}").and_then(|()| to.flush());
}
