//! Random bytes from the kernel.

use std::io;

/// Fills `bytes`.
///
/// # Errors
/// The kernel's: without entropy, or when a signal came between.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // Requests of up to 256 bytes are never cut short once the pool is up.
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}
