//! Rate limits of devices: token buckets for bytes and operations.
//!
//! A bucket fills at its rate up to its burst. Tokens are taken out after an
//! operation has begun, so that a packet or a request that is larger than the
//! burst is possible at all: the bucket then has a debt, and the next operation
//! waits until it is paid. Over time nothing is faster than its rate.

use std::io;
use std::time::{Duration, Instant};

use husk_vmm_api::RateLimit;
use husk_vmm_api::words::say;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};

/// The version of [`LimiterState`].
const VERSION: u16 = 1;

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// A bucket of one kind of token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bucket {
    /// Tokens per second, more than 0.
    rate: u64,
    /// Most tokens at a time.
    burst: u64,
    /// Tokens now; a negative number is a debt.
    tokens: i128,
    /// The time up to which the bucket was filled.
    filled: Duration,
}

impl Bucket {
    /// Makes a full bucket; none without a rate.
    fn new(rate: u64, burst: u64, now: Duration) -> Option<Self> {
        let burst = if burst == 0 { rate } else { burst };
        (rate > 0).then_some(Self { rate, burst, tokens: burst.into(), filled: now })
    }

    fn fill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.filled).as_nanos();
        let new = elapsed.saturating_mul(self.rate.into()) / NANOS_PER_SECOND;
        let room = i128::from(self.burst) - self.tokens;
        if i128::try_from(new).is_ok_and(|new| new < room) {
            // The time of a whole number of tokens, so that the part of the next
            // one is not lost. It is rounded up, so that no token is counted twice.
            let took = (new * NANOS_PER_SECOND).div_ceil(self.rate.into());
            self.tokens += i128::try_from(new).unwrap_or_default();
            self.filled += Duration::from_nanos(u64::try_from(took.min(elapsed)).unwrap_or(u64::MAX));
        } else {
            self.tokens = self.burst.into();
            self.filled = now;
        }
    }

    /// The time until there is a token; `None` if there is one.
    fn wait(&mut self, now: Duration) -> Option<Duration> {
        self.fill(now);
        let missing = u128::try_from(1 - self.tokens).ok().filter(|missing| *missing > 0)?;
        let nanos = missing.saturating_mul(NANOS_PER_SECOND).div_ceil(self.rate.into());
        let wait = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        // A part of that time has already gone by.
        Some(wait.saturating_sub(now.saturating_sub(self.filled)).max(Duration::from_nanos(1)))
    }

    fn take(&mut self, count: u64) {
        self.tokens -= i128::from(count);
    }
}

/// Both buckets of one direction of a device.
#[derive(Clone, Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    /// The origin of the limiter's time.
    start: Instant,
}

/// A saved [`Limiter`]: the tokens of its buckets. Rates and bursts come from
/// the configuration, which may differ for a clone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimiterState {
    version: u16,
    bytes: Option<i64>,
    operations: Option<i64>,
}

impl Limiter {
    /// Makes full buckets; none for a device without limits.
    #[must_use]
    pub fn new(limit: Option<&RateLimit>) -> Option<Self> {
        let limit = limit?;
        let bytes = Bucket::new(limit.bytes_per_second, limit.bytes_burst, Duration::ZERO);
        let operations = Bucket::new(limit.operations_per_second, limit.operations_burst, Duration::ZERO);
        (bytes.is_some() || operations.is_some()).then(|| Self { bytes, operations, start: Instant::now() })
    }

    /// How long the device has to wait; `None` if it may continue.
    pub fn wait(&mut self) -> Option<Duration> {
        self.wait_at(self.start.elapsed())
    }

    fn wait_at(&mut self, now: Duration) -> Option<Duration> {
        let buckets = [&mut self.bytes, &mut self.operations];
        buckets.into_iter().flatten().filter_map(|bucket| bucket.wait(now)).max()
    }

    /// Counts one operation with so many bytes, which has begun.
    pub fn take(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
    }

    /// Saves the buckets as plain data.
    #[must_use]
    pub fn save(this: Option<&Self>) -> LimiterState {
        let tokens = |bucket: Option<&Bucket>| {
            bucket.map(|bucket| {
                i64::try_from(bucket.tokens).unwrap_or(if bucket.tokens < 0 { i64::MIN } else { i64::MAX })
            })
        };
        LimiterState {
            version: VERSION,
            bytes: tokens(this.and_then(|this| this.bytes.as_ref())),
            operations: tokens(this.and_then(|this| this.operations.as_ref())),
        }
    }

    /// Gives the buckets their saved tokens, as far as they hold them.
    ///
    /// # Errors
    /// The version, when another program saved them.
    pub fn restore(this: Option<Self>, state: &LimiterState) -> Result<Option<Self>, u16> {
        if state.version != VERSION {
            return Err(state.version);
        }
        Ok(this.map(|mut this| {
            let saved = [state.bytes, state.operations];
            for (bucket, saved) in [&mut this.bytes, &mut this.operations].into_iter().zip(saved) {
                if let (Some(bucket), Some(saved)) = (bucket, saved) {
                    bucket.tokens = i128::from(saved).min(bucket.burst.into());
                }
            }
            this
        }))
    }
}

/// A limiter with the timer of its waits, for the loop that serves the device.
#[derive(Debug)]
pub struct Throttle {
    limiter: Limiter,
    timer: TimerFd,
}

impl Throttle {
    /// Makes a throttle whose timer nothing waits for yet; none for a device without limits.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn new(limiter: Option<Limiter>) -> io::Result<Option<Self>> {
        limiter.map(|limiter| Ok(Self { limiter, timer: timer()? })).transpose()
    }

    /// Whether the device has to wait. The timer ends when it may go on.
    pub fn is_closed(&mut self) -> bool {
        let wait = self.limiter.wait();
        if let Some(wait) = wait {
            set(&self.timer, wait);
        }
        wait.is_some()
    }

    /// One operation with so many bytes was begun.
    pub fn take(&mut self, bytes: u64) {
        self.limiter.take(bytes);
    }

    /// The limiter, to be saved.
    #[must_use]
    pub const fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    /// The timer, to be watched.
    #[must_use]
    pub const fn timer(&self) -> &TimerFd {
        &self.timer
    }
}

/// Makes a timer for a device that has to wait.
///
/// # Errors
/// The process has too many open files.
pub fn timer() -> io::Result<TimerFd> {
    let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
    Ok(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?)
}

/// Sets a timer to end after this time.
pub fn set(timer: &TimerFd, wait: Duration) {
    let end = Expiration::OneShot(TimeSpec::from_duration(wait));
    if let Err(error) = timer.set(end, TimerSetTimeFlags::empty()) {
        say(format_args!("husk-vmm: failed to set the timer of a rate limit: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A limiter with a clock that the test sets.
    struct Clock {
        limiter: Limiter,
        now: Duration,
    }

    impl Clock {
        fn new(limit: &RateLimit) -> Self {
            Self { limiter: Limiter::new(Some(limit)).unwrap(), now: Duration::ZERO }
        }

        /// Does one operation as soon as it is allowed.
        fn operate(&mut self, bytes: u64) {
            while let Some(wait) = self.limiter.wait_at(self.now) {
                self.now += wait;
            }
            self.limiter.take(bytes);
        }
    }

    #[test]
    fn a_burst_is_free_and_the_rest_has_its_rate() {
        let mut clock = Clock::new(&RateLimit::new((1000, 500), (0, 0)));
        for _ in 0..5 {
            clock.operate(100);
        }
        assert_eq!(clock.now, Duration::ZERO);
        for _ in 0..20 {
            clock.operate(100);
        }
        // The last operation begins when the debt of the earlier ones is paid.
        let seconds = clock.now.as_secs_f64();
        assert!((1.9..=2.0).contains(&seconds), "{seconds}");
        // A long wait earns no more than the burst.
        clock.now += Duration::from_secs(3600);
        let before = clock.now;
        for _ in 0..5 {
            clock.operate(100);
        }
        assert_eq!(clock.now, before);
        clock.operate(1);
        assert!(clock.now > before);
    }

    #[test]
    fn what_is_larger_than_the_burst_waits_afterwards() {
        let mut clock = Clock::new(&RateLimit::new((1000, 10), (0, 0)));
        clock.operate(5010);
        assert_eq!(clock.now, Duration::ZERO);
        clock.operate(1);
        assert_eq!(clock.now, Duration::from_millis(5001));
    }

    #[test]
    fn operations_are_counted_beside_bytes() {
        let mut clock = Clock::new(&RateLimit::new((1 << 40, 0), (10, 1)));
        for _ in 0..11 {
            clock.operate(4096);
        }
        assert_eq!(clock.now, Duration::from_secs(1));
    }

    #[test]
    fn without_a_limit_there_is_no_limiter() {
        assert!(Limiter::new(None).is_none());
        assert!(Limiter::new(Some(&RateLimit::default())).is_none());
    }

    #[test]
    fn a_saved_limiter_goes_on_with_its_debt() {
        let config = RateLimit::new((1000, 100), (5, 5));
        let mut clock = Clock::new(&config);
        clock.operate(1100);
        let state = Limiter::save(Some(&clock.limiter));
        let bytes = bitcode::serialize(&state).unwrap();
        assert_eq!(bitcode::deserialize::<LimiterState>(&bytes).unwrap(), state);
        let limiter = Limiter::restore(Limiter::new(Some(&config)), &state).unwrap().unwrap();
        let mut restored = Clock { limiter, now: Duration::ZERO };
        restored.operate(1);
        assert_eq!(restored.now, Duration::from_millis(1001));
        // Other limits count from now on, and another version is refused.
        let smaller =
            Limiter::restore(Limiter::new(Some(&RateLimit::new((0, 0), (5, 2)))), &state).unwrap().unwrap();
        assert_eq!(smaller.operations.unwrap().tokens, 2);
        assert!(Limiter::restore(None, &state).unwrap().is_none());
        assert_eq!(Limiter::restore(None, &LimiterState { version: 7, ..state }).unwrap_err(), 7);
    }

    proptest! {
        #[test]
        fn no_device_is_faster_than_its_rate_nor_stands_still(
            rate in 1u64..1 << 40,
            burst in 0u64..1 << 40,
            sizes in proptest::collection::vec(0u64..1 << 32, 1..50),
        ) {
            let mut clock = Clock::new(&RateLimit::new((rate, burst), (0, 0)));
            let mut done = 0u128;
            for size in &sizes {
                clock.operate(*size);
                let burst = if burst == 0 { rate } else { burst };
                let most = u128::from(burst) + clock.now.as_nanos() * u128::from(rate) / NANOS_PER_SECOND + 1;
                prop_assert!(done < most, "{done} of {most} at {:?}", clock.now);
                done += u128::from(*size);
            }
        }
    }
}
