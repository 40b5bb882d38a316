//! Starts the programs that outlive huskd: a pod's VMM, its file server, the
//! supervisor of its host containers. A program that huskd waits for (mkfs, a CNI
//! plugin) is a [`helper`].
//!
//! All that a program begins with is in place before its first instruction: its
//! session, control group, limits and descriptors. So there is no moment in which
//! it counts for nobody, or in which the end of its pod would miss it.

use std::ffi::{CString, OsStr, c_char, c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

mod helper;
mod idle;
mod reaper;
#[cfg(test)]
mod tests;

pub use helper::helper;
pub use idle::{Idle, idle};

/// Bytes of stack that a process has until it runs its program.
const STACK: usize = 64 * 1024;

/// The score of every program at its start: huskd's own, which keeps it from the
/// kernel's hand when memory is short, is not theirs.
const OOM_SCORE_ADJ: &[u8] = b"0";

/// A limit of a process (`setrlimit(2)`), which is its own and its children's.
pub type Limit = (libc::__rlimit_resource_t, u64);

/// A process that was started.
#[derive(Debug)]
pub struct Spawned {
    /// The process id here, which may become another's once the process has ended.
    pub pid: u32,
    /// The process itself.
    pub pidfd: OwnedFd,
}

/// A program to start, with no environment and nothing on its standard streams.
#[derive(Debug)]
pub struct Detached {
    program: CString,
    arguments: Vec<CString>,
    stdin: Option<OwnedFd>,
    log: Option<File>,
    descriptors: Vec<OwnedFd>,
    group: Option<File>,
    limits: Vec<Limit>,
    own_pids: bool,
}

impl Detached {
    /// The program at `path`.
    ///
    /// # Errors
    /// `InvalidInput` for a path that no file can have.
    pub fn new(path: &Path) -> io::Result<Self> {
        let program = text(path.as_os_str())?;
        Ok(Self {
            arguments: vec![program.clone()],
            program,
            stdin: None,
            log: None,
            descriptors: Vec::new(),
            group: None,
            limits: Vec::new(),
            own_pids: false,
        })
    }

    /// Adds arguments.
    ///
    /// # Errors
    /// `InvalidInput` for one that cannot be passed on.
    pub fn arguments<T: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = T>) -> io::Result<Self> {
        for argument in arguments {
            self.arguments.push(text(argument.as_ref())?);
        }
        Ok(self)
    }

    /// Gives it a standard input.
    #[must_use]
    pub fn stdin(mut self, stdin: OwnedFd) -> Self {
        self.stdin = Some(stdin);
        self
    }

    /// Gives it a file for its standard error.
    #[must_use]
    pub fn log(mut self, log: File) -> Self {
        self.log = Some(log);
        self
    }

    /// Gives it a descriptor: the first is its number 3, the next 4.
    #[must_use]
    pub fn descriptor(mut self, descriptor: OwnedFd) -> Self {
        self.descriptors.push(descriptor);
        self
    }

    /// Has it begin in the control group at `path`.
    ///
    /// # Errors
    /// There is no such group.
    pub fn cgroup(mut self, path: &Path) -> io::Result<Self> {
        self.group = Some(File::options().write(true).open(path.join("cgroup.procs"))?);
        Ok(self)
    }

    /// Gives it limits.
    #[must_use]
    pub fn limits(mut self, limits: impl IntoIterator<Item = Limit>) -> Self {
        self.limits.extend(limits);
        self
    }

    /// Makes it the first process of a PID namespace of its own, so that no other
    /// process has a number by which it could be signalled.
    #[must_use]
    pub fn own_pids(mut self) -> Self {
        self.own_pids = true;
        self
    }

    /// Starts the program. A thread of this crate waits for its end.
    ///
    /// # Errors
    /// The error names the step that failed; nothing runs then.
    pub fn spawn(self) -> io::Result<Spawned> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let raw = |fd: Option<RawFd>| fd.unwrap_or(null.as_raw_fd());
        let mut streams = vec![
            raw(self.stdin.as_ref().map(AsRawFd::as_raw_fd)),
            null.as_raw_fd(),
            raw(self.log.as_ref().map(AsRawFd::as_raw_fd)),
        ];
        streams.extend(self.descriptors.iter().map(AsRawFd::as_raw_fd));
        let mut argv: Vec<*const c_char> = self.arguments.iter().map(|argument| argument.as_ptr()).collect();
        argv.push(std::ptr::null());
        let mut start = Start {
            program: self.program.as_ptr(),
            argv: argv.as_ptr(),
            descriptors: streams,
            group: self.group.as_ref().map_or(-1, AsRawFd::as_raw_fd),
            limits: &self.limits,
            failure: None,
        };
        let spawned = begin(&mut start, self.own_pids)?;
        if let Some((step, errno)) = start.failure {
            let cause = io::Error::from_raw_os_error(errno);
            reaper::wait(&spawned.pidfd);
            return Err(if step == EXECUTE {
                cause
            } else {
                io::Error::new(cause.kind(), format!("{step}: {cause}"))
            });
        }
        reaper::add(spawned.pidfd.try_clone()?)?;
        Ok(spawned)
    }
}

/// A descriptor of the process that has this number now.
///
/// # Errors
/// There is no such process, or this one cannot have more descriptors.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = pid.try_into().ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn text(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.as_bytes())?)
}

/// The steps of the new process before it runs its program. It shares its maker's
/// memory, which has all that these steps need.
struct Start<'a> {
    program: *const c_char,
    argv: *const *const c_char,
    /// The descriptors that become 0, 1, 2, ...; replaced by copies.
    descriptors: Vec<RawFd>,
    group: RawFd,
    limits: &'a [Limit],
    /// The step that failed, with the kernel's error.
    failure: Option<(&'static str, c_int)>,
}

/// The step whose errors are about the program, as whoever starts it knows.
const EXECUTE: &str = "run the program";

/// Makes the process, and returns when it runs its program or has failed.
fn begin(start: &mut Start<'_>, own_pids: bool) -> io::Result<Spawned> {
    // The kernel wants the stack's upper end, at a multiple of 16.
    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let flags = if own_pids { flags | libc::CLONE_NEWPID } else { flags };
    let mut pidfd: c_int = -1;
    // SAFETY: the thread stands still until the process has left this memory
    // (CLONE_VFORK), so that all that `start` borrows lives; the process has a
    // stack of its own, which lives as long, and does system calls alone. Signals
    // are blocked meanwhile: no handler of ours runs in it.
    let pid = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
        let top = stack.as_mut_ptr_range().end.cast::<c_void>();
        let argument = std::ptr::from_mut(start).cast::<c_void>();
        let pid = libc::clone(prepare, top, flags, argument, &raw mut pidfd);
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        if pid < 0 {
            return Err(error);
        }
        pid
    };
    // SAFETY: the kernel has just made the descriptor, for nobody else.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Spawned { pid: pid.cast_unsigned(), pidfd })
}

extern "C" fn prepare(start: *mut c_void) -> c_int {
    // SAFETY: `begin` passes its own, and touches it only when this has ended.
    let start = unsafe { &mut *start.cast::<Start<'_>>() };
    // SAFETY: system calls, with pointers to what `start` holds.
    let Err(step) = unsafe { start.run() };
    start.failure = Some((step, io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)));
    127
}

impl Start<'_> {
    /// Returns only the step that failed, with its error in `errno`.
    ///
    /// # Safety
    /// Must be called in a process of its own. The process may share another's memory, so
    /// nothing here takes memory or a lock.
    unsafe fn run(&mut self) -> Result<std::convert::Infallible, &'static str> {
        let check = |step, result: c_int| if result < 0 { Err(step) } else { Ok(result) };
        // SAFETY: see above; each call gets numbers, or pointers to what lives.
        unsafe {
            check("begin a session", libc::setsid())?;
            if self.group >= 0 && libc::write(self.group, c"0".as_ptr().cast(), 1) != 1 {
                // "0" is the process that writes it.
                return Err("join the control group");
            }
            reset_oom_score();
            check("leave the working directory", libc::chdir(c"/".as_ptr()))?;
            self.place_descriptors()?;
            // Afterwards: huskd may have more files open than the program may.
            for (resource, value) in self.limits {
                let limit = libc::rlimit { rlim_cur: *value, rlim_max: *value };
                check("set limits", libc::setrlimit(*resource, &raw const limit))?;
            }
            reset_signals();
            let environment: [*const c_char; 1] = [std::ptr::null()];
            libc::execve(self.program, self.argv, environment.as_ptr());
            Err(EXECUTE)
        }
    }

    /// Gives each descriptor its number, and closes all others with the program's
    /// start, whoever forgot to mark them.
    unsafe fn place_descriptors(&mut self) -> Result<(), &'static str> {
        const STEP: &str = "pass descriptors on";
        let count = c_int::try_from(self.descriptors.len()).unwrap_or(c_int::MAX);
        // SAFETY: numbers alone.
        unsafe {
            // Out of the way first: one may sit at the number of another.
            for descriptor in &mut self.descriptors {
                *descriptor = libc::fcntl(*descriptor, libc::F_DUPFD_CLOEXEC, count);
                if *descriptor < 0 {
                    return Err(STEP);
                }
            }
            for (number, descriptor) in (0..).zip(&self.descriptors) {
                if libc::dup2(*descriptor, number) < 0 {
                    return Err(STEP);
                }
            }
            // Linux 5.11; without it, what was opened here is marked anyhow.
            libc::syscall(libc::SYS_close_range, count, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        }
        Ok(())
    }
}

/// Raising the score needs no privilege; where it cannot be lowered it stays.
unsafe fn reset_oom_score() {
    // SAFETY: a path and a text that live for ever.
    unsafe {
        let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file >= 0 {
            libc::write(file, OOM_SCORE_ADJ.as_ptr().cast(), OOM_SCORE_ADJ.len());
            libc::close(file);
        }
    }
}

/// Every signal does what it does by default, and none is blocked. Handlers are
/// reset before: between here and the program's start they would be ours.
unsafe fn reset_signals() {
    const SIGNALS: c_int = 64;
    // SAFETY: structs of this stack, and numbers; what cannot be changed stays.
    unsafe {
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        for signal in 1..=SIGNALS {
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}
