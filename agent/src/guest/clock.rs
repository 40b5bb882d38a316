//! Wall-clock time and the seed of random numbers, which a machine that was
//! just made, or cloned from a template, cannot know by itself.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

/// Most bytes of seed that are used.
pub const MAX_ENTROPY: usize = 512;

/// Fewest bytes of seed that make a machine's random numbers unique: as many as
/// the kernel's pool holds.
const MIN_ENTROPY: usize = 32;

/// Nanoseconds since 1970.
pub fn unix_nanos() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Sets the wall clock to `nanos` since 1970.
pub fn set(nanos: i64) -> io::Result<()> {
    let since = Duration::from_nanos(u64::try_from(nanos).map_err(io::Error::other)?);
    Ok(clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(since))?)
}

/// From this difference on, the clock is set at once. A smaller difference is
/// slewed: the clock runs a little faster or slower for some time, and never
/// back.
const STEP_NANOS: u64 = 500_000_000;

/// Moves the wall clock by `nanos`.
pub fn adjust(nanos: i64) -> io::Result<()> {
    if nanos == 0 {
        return Ok(());
    }
    if nanos.unsigned_abs() >= STEP_NANOS {
        return set(unix_nanos().saturating_add(nanos));
    }
    // SAFETY: all-zero bytes are a valid timex.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = nanos / 1000;
    // SAFETY: the kernel reads and writes `change`, which is one, during the call.
    Errno::result(unsafe { libc::adjtimex(&raw mut change) })?;
    Ok(())
}

/// Refuses a seed that is too short: a clone of a template would draw the same
/// random numbers as every other clone.
pub fn check_seed(seed: &[u8]) -> Result<(), String> {
    if seed.len() < MIN_ENTROPY {
        return Err(format!("a seed of {} bytes; at least {MIN_ENTROPY} are needed", seed.len()));
    }
    Ok(())
}

/// The header of `RNDADDENTROPY`'s argument (`struct rand_pool_info`), with
/// room for the bytes behind it.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; MAX_ENTROPY],
}

nix::ioctl_write_ptr_bad!(add_entropy, nix::request_code_write!(b'R', 0x03, 8), PoolInfo);
nix::ioctl_none!(reseed, b'R', 0x07);

/// Adds `seed` to the kernel's random number generator, and reseeds the
/// generator at once (random(4)). At most [`MAX_ENTROPY`] bytes are used.
pub fn seed(seed: &[u8]) -> io::Result<()> {
    let seed = seed.get(..MAX_ENTROPY).unwrap_or(seed);
    let length = libc::c_int::try_from(seed.len()).map_err(io::Error::other)?;
    let mut info = PoolInfo { entropy_bits: length * 8, size: length, bytes: [0; MAX_ENTROPY] };
    for (to, from) in info.bytes.iter_mut().zip(seed) {
        *to = *from;
    }
    let random = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: `info` is laid out as rand_pool_info and holds `size` bytes; the
    // kernel only reads it during the call.
    unsafe { add_entropy(random.as_raw_fd(), &raw const info) }?;
    // SAFETY: the request has no argument.
    unsafe { reseed(random.as_raw_fd()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_seed_of_its_own_is_refused() {
        for length in [0, 1, MIN_ENTROPY - 1] {
            let refused = check_seed(&vec![7; length]).unwrap_err();
            assert!(refused.contains(&format!("a seed of {length} bytes")), "{refused}");
        }
        assert_eq!(check_seed(&[7; 64]), Ok(()));
    }
}
