//! Namespaces that the pod's containers share, above all the pid namespace. Its
//! pid 1 is a process of this program, which reaps the orphans of the
//! containers.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::ExitCode;

use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

use crate::process::reaper::{self, Reaper};

/// The argument that makes this program the namespace's first process.
pub const PAUSE: &str = "pause";

/// Starts the namespace and pins it at `path`, which the OCI configurations of
/// containers name.
pub fn create_pid_namespace(reaper: &Reaper, path: &Path) -> io::Result<()> {
    pin(start_pause(reaper, libc::CLONE_NEWPID)?, "pid", path)
}

/// Keeps a namespace of the process `pid` alive at `path`.
pub fn pin(pid: Pid, kind: &str, path: &Path) -> io::Result<()> {
    File::create(path)?;
    let namespace = format!("/proc/{pid}/ns/{kind}");
    nix::mount::mount(Some(namespace.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// Starts a first process for the new namespaces that `flags` (`CLONE_NEW*`)
/// name.
pub fn start_pause(reaper: &Reaper, flags: i32) -> io::Result<Pid> {
    let program = c"/proc/self/exe";
    let name = CString::new("husk-pause").map_err(io::Error::other)?;
    let argument = CString::new(PAUSE).map_err(io::Error::other)?;
    let arguments = [name.as_ptr(), argument.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<libc::c_char>()];

    let launch = reaper.launch();
    let (pid, _exit) = launch.spawn_with(|| {
        let flags = libc::c_long::from(flags | libc::SIGCHLD);
        // SAFETY: without CLONE_VM and with no stack this is fork(2): the child
        // has a copy of this thread's memory. Until execve(2) it makes only
        // system calls, with arguments made before.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: see above; the pointers are of this frame.
            unsafe {
                libc::syscall(libc::SYS_execve, program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
                libc::syscall(libc::SYS_exit_group, 127);
            }
        }
        let pid = Errno::result(pid)?;
        i32::try_from(pid).map(Pid::from_raw).map_err(io::Error::other)
    })?;
    // A machine that runs out of memory kills the pod's containers first.
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "-998");
    Ok(pid)
}

/// Runs the namespace's first process: it reaps until it is killed.
pub fn pause() -> ExitCode {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    // As pid 1 it gets no signal without a handler, except the agent's SIGKILL.
    if signals.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        // Several processes that end at once make one SIGCHLD.
        while reaper::next_ended().is_some() {}
        if signals.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
