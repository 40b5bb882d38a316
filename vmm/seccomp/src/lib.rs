//! The system calls that a process which faces a guest may make (seccomp).
//!
//! A [`List`] begins with the calls that every thread needs: memory that cannot
//! be executed, threads but no processes, locks, clocks, exiting. Each program
//! adds the calls of its own task.

use std::collections::BTreeMap;

use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};

pub use seccompiler::{BackendError, Error};

/// Calls that every thread may make with any arguments.
const EVERY_THREAD: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The further system calls of a program that is started with the list in place: its loader
/// maps code, and its C library asks for the properties of the system.
const PROGRAM_START: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_arch_prctl,
    libc::SYS_set_tid_address,
    libc::SYS_rt_sigaction,
    libc::SYS_prlimit64,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_umask,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_membarrier,
];

/// Flags of a thread as `pthread_create` makes it; no process has them.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// The signal by which the C library makes all threads change their user.
const SIGSETXID: u64 = 33;

/// The bits of an `ioctl`'s request that name its type and number.
const KIND_AND_NUMBER: u64 = 0xffff;

/// The consequence for a thread that makes a call which is not on its list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The thread gets `SIGSYS`, which ends the process unless it is handled.
    Signal,
    /// The call fails with `EPERM`.
    Error,
}

/// The system calls that a thread may make.
#[derive(Clone, Debug)]
pub struct List(BTreeMap<i64, Vec<SeccompRule>>);

impl List {
    /// The calls that every thread needs.
    ///
    /// # Errors
    /// None that depends on anything but this program.
    pub fn new() -> Result<Self, BackendError> {
        let mut list = Self(BTreeMap::new()).calls(EVERY_THREAD);
        let not_executable = SeccompCondition::new(2, Dword, MaskedEq(libc::PROT_EXEC as u64), 0)?;
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            list.0.insert(call, vec![SeccompRule::new(vec![not_executable.clone()])?]);
        }
        let thread = SeccompCondition::new(0, Qword, Eq, THREAD)?;
        list.0.insert(libc::SYS_clone, vec![SeccompRule::new(vec![thread])?]);
        // The flags of clone3 are in memory, where a filter cannot see them:
        // see `install`.
        list = list.calls(&[libc::SYS_clone3]);
        // A thread sets its name, signals its own process, and the C library
        // handles its own signal once there is a second thread.
        list.first_is(libc::SYS_prctl, libc::PR_SET_NAME as u64)?
            .first_is(libc::SYS_tgkill, std::process::id().into())?
            .first_is(libc::SYS_rt_sigaction, SIGSETXID)
    }

    /// The system calls of a program that the calling process is going to execute. It can map
    /// code, copy descriptors, and execute other programs, with the same list.
    ///
    /// # Errors
    /// None that depends on anything but this program.
    pub fn of_program() -> Result<Self, BackendError> {
        let mut list = Self::new()?.calls(PROGRAM_START);
        let copy = SeccompCondition::new(1, Dword, Eq, libc::F_DUPFD as u64)?;
        list.0.entry(libc::SYS_fcntl).or_default().push(SeccompRule::new(vec![copy])?);
        Ok(list)
    }

    /// Adds calls with any arguments.
    #[must_use]
    pub fn calls(mut self, calls: &[i64]) -> Self {
        self.0.extend(calls.iter().map(|call| (*call, Vec::new())));
        self
    }

    /// Allows a call with this value of its first argument, besides those
    /// allowed before.
    ///
    /// # Errors
    /// None that depends on anything but this program.
    pub fn first_is(mut self, call: i64, value: u64) -> Result<Self, BackendError> {
        let rule = SeccompRule::new(vec![SeccompCondition::new(0, Dword, Eq, value)?])?;
        self.0.entry(call).or_default().push(rule);
        Ok(self)
    }

    /// Allows the commands of `fcntl` that copy a descriptor, or read and set its
    /// flags. The other commands reach further: they lock files, and make the
    /// kernel signal any process (`F_SETOWN`, `F_SETSIG`, `O_ASYNC`).
    ///
    /// # Errors
    /// None that depends on anything but this program.
    pub fn descriptor_flags(mut self) -> Result<Self, BackendError> {
        let command = |value: i32| SeccompCondition::new(1, Dword, Eq, value.cast_unsigned().into());
        let rules = self.0.entry(libc::SYS_fcntl).or_default();
        for value in [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC] {
            rules.push(SeccompRule::new(vec![command(value)?])?);
        }
        let quiet = SeccompCondition::new(2, Dword, MaskedEq(libc::O_ASYNC as u64), 0)?;
        rules.push(SeccompRule::new(vec![command(libc::F_SETFL)?, quiet])?);
        Ok(self)
    }

    /// Allows requests of `ioctl` by type (`'T'`) and number. The filter
    /// ignores size and direction.
    ///
    /// # Errors
    /// None that depends on anything but this program.
    pub fn requests(mut self, kind: u8, numbers: &[u8]) -> Result<Self, BackendError> {
        for number in numbers {
            let request = u64::from(u16::from_be_bytes([kind, *number]));
            let condition = SeccompCondition::new(1, Dword, MaskedEq(KIND_AND_NUMBER), request)?;
            self.0.entry(libc::SYS_ioctl).or_default().push(SeccompRule::new(vec![condition])?);
        }
        Ok(self)
    }

    /// Whether a call is on the list, with some arguments at least.
    #[must_use]
    pub fn has(&self, call: i64) -> bool {
        self.0.contains_key(&call)
    }

    /// Restricts the calling thread, and the threads that it starts from now on,
    /// to the list.
    ///
    /// # Errors
    /// The kernel has no seccomp.
    pub fn install(self, refusal: Refusal) -> Result<(), Error> {
        // The call fails, and the C library falls back to `clone`.
        let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        apply(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
        self.narrow(refusal)
    }

    /// Restricts a thread that already has a list to this list as well. The kernel
    /// runs all filters of a thread on each call, so this adds only one program.
    ///
    /// # Errors
    /// The kernel has no seccomp.
    pub fn narrow(self, refusal: Refusal) -> Result<(), Error> {
        let refused = match refusal {
            Refusal::Signal => SeccompAction::Trap,
            Refusal::Error => SeccompAction::Errno(libc::EPERM as u32),
        };
        apply(self.0, refused, SeccompAction::Allow)
    }
}

fn apply(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    listed: SeccompAction,
) -> Result<(), Error> {
    let filter = SeccompFilter::new(rules, others, listed, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::thread;

    use super::*;

    /// The error of a call, in a thread that has only [`List::new`].
    fn refused(number: i64, arguments: [i64; 3]) -> Option<i32> {
        let call = move || {
            List::new().unwrap().install(Refusal::Error).unwrap();
            // SAFETY: the calls made here take no pointers, or null ones.
            let result = unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) };
            (result < 0).then(|| io::Error::last_os_error().raw_os_error()).flatten()
        };
        thread::spawn(call).join().unwrap()
    }

    #[test]
    fn what_is_not_on_the_list_fails_and_nothing_else() {
        assert_eq!(refused(libc::SYS_getpid, [0; 3]), None);
        for (call, arguments) in [
            (libc::SYS_socket, [1, 1, 0]),
            (libc::SYS_kill, [0; 3]),
            (libc::SYS_tgkill, [1, 1, 0]),
            (libc::SYS_ioctl, [-1, 0x5401, 0]),
            (libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0]),
            (libc::SYS_mprotect, [0, 0, libc::PROT_EXEC.into()]),
        ] {
            assert_eq!(refused(call, arguments), Some(libc::EPERM), "call {call}");
        }
        assert_eq!(refused(libc::SYS_mprotect, [0, 0, libc::PROT_READ.into()]), None);
        assert_eq!(refused(libc::SYS_clone3, [0; 3]), Some(libc::ENOSYS));
    }

    #[test]
    fn descriptors_are_copied_and_nobody_is_signalled_by_one() {
        let refused = |command: i32, value: i32| {
            let call = move || {
                List::new().unwrap().descriptor_flags().unwrap().install(Refusal::Error).unwrap();
                // SAFETY: these commands of fcntl take numbers.
                let result = unsafe { libc::fcntl(0, command, value) };
                (result < 0).then(|| io::Error::last_os_error().raw_os_error()).flatten()
            };
            thread::spawn(call).join().unwrap() == Some(libc::EPERM)
        };
        for (command, value) in [
            (libc::F_SETOWN, 1),
            (F_SETSIG, libc::SIGKILL),
            (libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK),
            (libc::F_SETLK, 0),
            (F_SETOWN_EX, 0),
        ] {
            assert!(refused(command, value), "fcntl {command} with {value:#x}");
        }
        for (command, value) in [(libc::F_GETFD, 0), (libc::F_GETFL, 0), (libc::F_DUPFD_CLOEXEC, 10)] {
            assert!(!refused(command, value), "fcntl {command}");
        }
    }

    // From Linux, include/uapi/asm-generic/fcntl.h.
    const F_SETSIG: i32 = 10;
    const F_SETOWN_EX: i32 = 15;

    #[test]
    fn threads_are_made_and_are_restricted_like_their_maker() {
        let inner = || {
            List::new().unwrap().install(Refusal::Error).unwrap();
            let made = thread::Builder::new().name("another".into()).spawn(|| {
                let memory = vec![1u8; 4 << 20];
                // SAFETY: it takes numbers.
                let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) };
                (memory.len(), socket)
            });
            made.unwrap().join().unwrap()
        };
        assert_eq!(thread::spawn(inner).join().unwrap(), (4 << 20, -1));
    }
}
