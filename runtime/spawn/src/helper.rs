//! Programs that huskd waits for.

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A program that huskd waits for. It starts with the OOM score 0: the score that spares
/// huskd when memory runs out must not spare every child of it.
#[must_use]
pub fn helper(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    let reset = || -> io::Result<()> {
        // SAFETY: system calls alone, as a process needs that shares a heap's locks with
        // threads which it does not have (signal-safety(7)).
        unsafe { crate::reset_oom_score() };
        Ok(())
    };
    // SAFETY: see above.
    unsafe { command.pre_exec(reset) };
    command
}
