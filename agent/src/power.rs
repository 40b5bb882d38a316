//! The end of the machine.

use std::fs::OpenOptions;
use std::io::Write;

use nix::sys::reboot::{RebootMode, reboot};

/// What the VMM looks for on the console: a reset after this line is a
/// shut-down, one without it is not.
const MARKER: &str = "husk: shutdown\n";

/// Resets the machine. There is no firmware that could cut the power, so the
/// VMM ends at the reset.
pub fn off() -> anyhow::Result<()> {
    nix::unistd::sync();
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(MARKER.as_bytes());
    }
    let never = reboot(RebootMode::RB_AUTOBOOT)?;
    match never {}
}
