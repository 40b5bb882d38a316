//! How much processor time something takes at present, from a counter of all
//! that it took.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use husk_base::lock;

/// Shortest time that a rate is taken over: over less it says little.
const SHORTEST: Duration = Duration::from_secs(1);

/// Remembers one reading of the counter. It goes with what is counted.
#[derive(Debug, Default)]
pub struct CpuRate(Mutex<Option<Reading>>);

#[derive(Clone, Copy, Debug)]
struct Reading {
    at: Instant,
    nanos: u64,
    /// The rate up to it.
    rate: Option<u64>,
}

impl CpuRate {
    /// Nanoseconds of processor time per second since the last reading, which
    /// this one takes the place of; `None` for the first. Whoever asks again too
    /// soon hears the same as before.
    pub fn read(&self, nanos: u64, at: Instant) -> Option<u64> {
        let mut last = lock(&self.0);
        let rate = match *last {
            Some(last) => match at.saturating_duration_since(last.at) {
                passed if passed < SHORTEST => return last.rate,
                // Only what is no counter goes back.
                passed => nanos.checked_sub(last.nanos).map(|taken| per_second(taken, passed)),
            },
            None => None,
        };
        *last = Some(Reading { at, nanos, rate });
        rate
    }
}

fn per_second(nanos: u64, passed: Duration) -> u64 {
    let rate = (u128::from(nanos) * 1_000_000_000).checked_div(passed.as_nanos());
    rate.and_then(|rate| u64::try_from(rate).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_the_time_since_the_last_reading() {
        let (rate, start) = (CpuRate::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(rate.read(5_000, at(0)), None);
        assert_eq!(rate.read(6_000, at(10)), None, "too soon, and nothing to repeat");
        assert_eq!(rate.read(1_000_005_000, at(2000)), Some(500_000_000));
        assert_eq!(rate.read(9_000_000_000, at(2500)), Some(500_000_000), "too soon");
        assert_eq!(rate.read(1_000_005_000, at(4000)), Some(0));
        assert_eq!(rate.read(7, at(6000)), None, "it began anew");
        assert_eq!(rate.read(2_000_000_007, at(7000)), Some(2_000_000_000));
        assert_eq!(rate.read(u64::MAX, at(8000)), Some(u64::MAX - 2_000_000_007));
    }
}
