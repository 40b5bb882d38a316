//! Waits for the processes that were started, all of them in one thread, so that
//! none stays behind as a zombie.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// The processes that the thread waits for, once there is one.
static PROCESSES: Mutex<Option<Epoll>> = Mutex::new(None);

/// How many ended processes are taken at a time.
const BATCH: usize = 32;

/// Has a child of this process waited for.
///
/// # Errors
/// No more descriptors or threads.
pub fn add(pidfd: OwnedFd) -> io::Result<()> {
    let mut processes = PROCESSES.lock().unwrap_or_else(PoisonError::into_inner);
    if processes.is_none() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let theirs = Epoll(epoll.0.try_clone()?);
        std::thread::Builder::new().name("reap".into()).stack_size(32 * 1024).spawn(move || run(&theirs))?;
        *processes = Some(epoll);
    }
    if let Some(epoll) = processes.as_ref() {
        let number = pidfd.as_raw_fd();
        epoll.add(pidfd.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
        // The thread closes the descriptor.
        let _ = pidfd.into_raw_fd();
    }
    Ok(())
}

fn run(processes: &Epoll) {
    let mut events = [EpollEvent::empty(); BATCH];
    loop {
        let Ok(count) = processes.wait(&mut events, EpollTimeout::NONE) else { continue };
        for event in events.iter().take(count) {
            let Ok(number) = event.data().try_into() else { continue };
            // SAFETY: `add` gave the descriptor up to this thread, which sees it
            // once: closed, it is no longer waited for.
            let pidfd = unsafe { OwnedFd::from_raw_fd(number) };
            let _ = processes.delete(pidfd.as_fd());
            wait(&pidfd);
        }
    }
}

/// Waits for the end of a child.
pub fn wait(pidfd: &OwnedFd) {
    loop {
        // SAFETY: all zeroes are a valid siginfo_t, to which the kernel writes.
        let result = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let number = libc::id_t::try_from(pidfd.as_raw_fd()).unwrap_or_default();
            libc::waitid(libc::P_PIDFD, number, &raw mut info, libc::WEXITED)
        };
        let interrupted = io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
        if result == 0 || !interrupted {
            return;
        }
    }
}
