//! Turns the machine off.

use std::fs::OpenOptions;
use std::io::Write;

use husk_vmm_api::SHUTDOWN_MARKER;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::tcdrain;

/// Resets the machine, which has no power switch. The VMM ends at the reset,
/// and takes it for a shut-down because of the line on the console before it.
pub fn off() -> anyhow::Result<()> {
    nix::unistd::sync();
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(format!("{SHUTDOWN_MARKER}\n").as_bytes());
        let _ = tcdrain(&console);
    }
    let never = reboot(RebootMode::RB_AUTOBOOT)?;
    match never {}
}
