//! The ground floor: small things that every other crate of huskd needs.
//!
//! Ids, folders and files of huskd's own, records that are replaced as a whole, and
//! the one error for a file that could not be read or written. Nothing here knows
//! what a pod is.

#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

mod blocking;
pub mod cgroup;
pub mod crash;
pub mod dirs;
mod error;
pub mod id;
pub mod json;
pub mod mountinfo;
pub mod random;
pub mod record;
pub mod text_file;
mod tree;

pub use blocking::blocking;
pub use error::{FileError, chain, is_full_disk};
pub use json::{read_json, write_json};
pub use tree::remove as remove_tree;

/// Nanoseconds since 1970.
#[must_use]
pub fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|elapsed| i64::try_from(elapsed.as_nanos()).ok())
        .unwrap_or_default()
}

/// The start time of a process in clock ticks since the host's boot, from the text of its
/// `/proc/PID/stat`: what tells it from another that has its id later.
#[must_use]
pub fn start_time(stat: &str) -> Option<u64> {
    // The name, field 2, may have any bytes in it; the start time is field 22.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Locks a mutex, even one whose holder panicked. Callers replace as a whole what a
/// mutex guards, so that it is never left half-changed.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
