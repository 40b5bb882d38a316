//! Random bytes from the kernel.

use std::io;

/// Fills `bytes`.
///
/// # Errors
/// The kernel's.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(io::Error::from)
}
