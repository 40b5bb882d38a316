//! A process that does nothing, for a control group that must not be empty yet.

use std::io::{self, PipeWriter};
use std::os::fd::AsRawFd;

use crate::{pidfd, reaper, reset_oom_score};

/// A process that does nothing. It ends when this is dropped, and with huskd.
#[derive(Debug)]
pub struct Idle {
    pid: u32,
    /// The process ends with this end of a pipe.
    _end: PipeWriter,
}

impl Idle {
    /// The number of the process.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }
}

/// Makes an idle process.
///
/// # Errors
/// No more processes or descriptors.
pub fn idle() -> io::Result<Idle> {
    let (end, ours) = io::pipe()?;
    // SAFETY: the child makes system calls alone, as it must that shares a heap's locks
    // with threads which it does not have (signal-safety(7)), and never returns.
    let pid = unsafe {
        match libc::fork() {
            0 => wait_for_end(end.as_raw_fd()),
            pid => pid,
        }
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = pid.cast_unsigned();
    // Nobody has waited for the child yet, so its number is its own.
    reaper::add(pidfd(pid)?)?;
    Ok(Idle { pid, _end: ours })
}

/// Keeps nothing of huskd open but the pipe, and ends when the other end of it is closed.
///
/// # Safety
/// Must be called in a process of its own. It takes no memory and no lock, and does not return.
unsafe fn wait_for_end(pipe: libc::c_int) -> ! {
    // SAFETY: system calls, with pointers to what this stack and the program hold.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"husk-scope".as_ptr());
        reset_oom_score();
        libc::dup2(pipe, 0);
        libc::syscall(libc::SYS_close_range, 1, libc::c_uint::MAX, 0);
        let mut byte = 0u8;
        loop {
            let read = libc::read(0, (&raw mut byte).cast(), 1);
            if read == 0 || (read < 0 && *libc::__errno_location() != libc::EINTR) {
                libc::_exit(0);
            }
        }
    }
}
