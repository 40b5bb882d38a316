//! The system calls that the jail leaves. A call that is not on the list ends the
//! process, with an exit record that names it.
//!
//! There are two lists. The event loop's is the longer one; that of a vCPU has no
//! sockets, and of KVM only the requests to run. A thread inherits the list of
//! the thread that starts it. The threads of the disks are started by a vCPU when
//! a guest's driver activates the device, and by the event loop in a clone.

use std::fmt::{self, Write};
use std::sync::{Arc, OnceLock};

use husk_seccomp::{BackendError, List, Refusal};
use husk_vmm_api::{ExitReason, words};
use vmm_sys_util::signal::register_signal_handler;

use crate::exit::Record;
use crate::stage::{StageError, at};

/// Calls of every thread: reading, writing and waiting, with open files and
/// eventfds.
const EVERY_THREAD: &[i64] = &[
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_timerfd_settime,
];

/// Calls that the event loop needs besides: open sockets, new eventfds, sizes
/// of files.
const LOOP: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_mincore,
];

/// The type of KVM's ioctls.
const KVMIO: u8 = 0xae;

/// Ioctls that run a vCPU or read its state: `KVM_RUN`, `GET_REGS`, `GET_MSRS`,
/// `GET_LAPIC`, `GET_MP_STATE`.
const RUN: &[u8] = &[0x80, 0x81, 0x88, 0x8e, 0x98];

/// Ioctls that build a machine, save it or restore it. Some numbers have two
/// meanings, by direction.
const BUILD: &[u8] = &[
    0x02, // GET_MSR_INDEX_LIST
    0x03, // CHECK_EXTENSION
    0x04, // GET_VCPU_MMAP_SIZE
    0x05, // GET_SUPPORTED_CPUID
    0x41, // CREATE_VCPU
    0x46, // SET_USER_MEMORY_REGION
    0x62, // GET_IRQCHIP
    0x63, // SET_IRQCHIP
    0x76, // IRQFD
    0x79, // IOEVENTFD
    0x7b, // SET_CLOCK
    0x7c, // GET_CLOCK
    0x82, // SET_REGS
    0x83, // GET_SREGS
    0x84, // SET_SREGS
    0x89, // SET_MSRS
    0x8f, // SET_LAPIC
    0x90, // SET_CPUID2
    0x91, // GET_CPUID2
    0x99, // SET_MP_STATE
    0x9f, // GET_VCPU_EVENTS
    0xa0, // SET_VCPU_EVENTS
    0xa1, // GET_DEBUGREGS
    0xa2, // SET_DEBUGREGS, SET_TSC_KHZ
    0xa3, // GET_TSC_KHZ
    0xa4, // GET_XSAVE
    0xa5, // SET_XSAVE
    0xa6, // GET_XCRS
    0xa7, // SET_XCRS
    0xcf, // GET_XSAVE2
];

/// `TUNSETOFFLOAD` sets the offloads that the tap's driver has negotiated, when
/// that starts.
const TUN_OFFLOAD: u8 = 0xd0;
/// `TUNSETVNETHDRSZ` sets the size of the header before each of a tap's
/// packets.
const TUN_HEADER: u8 = 0xd8;
/// The ioctls `FIONBIO` and `FIOCLEX`.
const DESCRIPTOR: &[u8] = &[0x21, 0x51];

/// The threads that a list is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The event loop, and the threads that it starts.
    Loop,
    /// A vCPU, and the disks' threads that it starts.
    Vcpu,
}

/// Restricts the calling thread, and those that it starts, to `thread`'s list.
/// The event loop's list is installed first; a vCPU's narrows it.
///
/// # Errors
/// The kernel has no seccomp.
pub fn install(thread: Thread) -> Result<(), StageError> {
    const STAGE: &str = "restrict system calls";
    let list = list(thread).map_err(at(STAGE))?;
    match thread {
        Thread::Loop => list.install(Refusal::Signal),
        Thread::Vcpu => list.narrow(Refusal::Signal),
    }
    .map_err(at(STAGE))
}

fn list(thread: Thread) -> Result<List, BackendError> {
    let list = List::new()?
        .calls(EVERY_THREAD)
        .descriptor_flags()?
        .requests(KVMIO, RUN)?
        .requests(b'T', &[TUN_OFFLOAD])?;
    if thread == Thread::Vcpu {
        return Ok(list);
    }
    list.calls(LOOP)
        .requests(KVMIO, BUILD)?
        .requests(b'T', &[TUN_HEADER])?
        .requests(b'T', DESCRIPTOR)?
        // Narrowing the list further, as a vCPU's thread does.
        .first_is(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS as u64)?
        .first_is(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER.into())
}

/// The exit record, for the signal handler.
static RECORD: OnceLock<Arc<Record>> = OnceLock::new();

/// Makes a system call that is not on the list end the process with an exit
/// record.
///
/// # Errors
/// The kernel's.
pub fn end_on_refusal(record: Arc<Record>) -> Result<(), vmm_sys_util::errno::Error> {
    let _ = RECORD.set(record);
    register_signal_handler(libc::SIGSYS, refused)
}

/// The signal may have interrupted anything, so the handler takes no memory and no lock.
extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// The offset of the system call's number in siginfo_t (`si_syscall`).
    const SYSCALL: usize = 24;
    // SAFETY: the kernel gives a whole siginfo_t, and this is a number in it.
    let number = unsafe { info.cast::<u8>().add(SYSCALL).cast::<libc::c_int>().read_unaligned() };
    let mut text = Text { bytes: [0; 256], length: 0 };
    let _ = describe(&mut text, number);
    let text = text.bytes.get(..text.length).unwrap_or_default();
    if let Some(record) = RECORD.get() {
        record.write_bytes(text);
    }
    words::log_bytes(text);
    // SAFETY: ends the process without running anything else of it.
    unsafe { libc::_exit(ExitReason::VmmError.code()) }
}

/// Writes a [`husk_vmm_api::Exit`] as JSON.
fn describe(text: &mut Text, number: libc::c_int) -> fmt::Result {
    write!(
        text,
        "{{\"reason\":\"vmm_error\",\"detail\":\"husk-vmm made system call {number}, which it has no use for: \
         a fault in it, or a guest that has taken it over\",\"console\":\"\"}}"
    )
}

/// A text of limited length, on the stack.
struct Text {
    bytes: [u8; 256],
    length: usize,
}

impl Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let end = self.length + part.len();
        let room = self.bytes.get_mut(self.length..end).ok_or(fmt::Error)?;
        room.copy_from_slice(part.as_bytes());
        self.length = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};
    use std::thread;

    use husk_vmm_api::Exit;

    use super::*;

    fn exit_of(text: &[u8]) -> Exit {
        serde_json::from_slice(text).unwrap()
    }

    #[test]
    fn the_record_is_an_exit_whatever_the_number() {
        for number in [0, libc::c_int::MIN] {
            let mut text = Text { bytes: [0; 256], length: 0 };
            describe(&mut text, number).unwrap();
            let exit = exit_of(&text.bytes[..text.length]);
            assert_eq!(exit.reason, ExitReason::VmmError);
            assert!(exit.detail.contains(&format!("system call {number},")), "{}", exit.detail);
        }
    }

    #[test]
    fn a_vcpu_has_no_sockets_and_nobody_makes_any() {
        let (own, all) = (list(Thread::Vcpu).unwrap(), list(Thread::Loop).unwrap());
        for call in [libc::SYS_accept4, libc::SYS_recvmsg, libc::SYS_sendmsg] {
            assert!(!own.has(call) && all.has(call));
        }
        for call in [libc::SYS_socket, libc::SYS_connect, libc::SYS_openat, libc::SYS_execve, libc::SYS_kill]
        {
            assert!(!all.has(call));
        }
    }

    /// Runs `act` in a process of its own, under the list of `thread`; returns
    /// its exit code and record.
    fn restricted(thread: Thread, act: fn()) -> (i32, Vec<u8>) {
        let mut file = tempfile::tempfile().unwrap();
        let record = Arc::new(Record::new(file.try_clone().unwrap()));
        // SAFETY: the child has this thread alone. What it does takes memory,
        // which the C library allows after a fork.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let ready = end_on_refusal(record).is_ok()
                && install(Thread::Loop).is_ok()
                && (thread == Thread::Loop || install(thread).is_ok());
            if ready {
                act();
            }
            // SAFETY: ends the process, and nothing else of it.
            unsafe { libc::_exit(if ready { 0 } else { 99 }) }
        }
        let mut status = 0;
        // SAFETY: `status` is a number of our own.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        let mut text = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut text).unwrap();
        text.retain(|byte| *byte != 0);
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        (libc::WEXITSTATUS(status), text)
    }

    fn syscall(number: libc::c_long, arguments: [libc::c_long; 3]) {
        // SAFETY: the calls made here take no pointers, or null ones.
        unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) };
    }

    #[test]
    fn what_is_on_no_list_ends_the_process_with_a_record() {
        let refused = |thread, act: fn(), number: libc::c_long| {
            let (code, text) = restricted(thread, act);
            assert_eq!(code, ExitReason::VmmError.code(), "{}", String::from_utf8_lossy(&text));
            let detail = exit_of(&text).detail;
            assert!(detail.contains(&format!("system call {number},")), "{detail}");
        };
        refused(Thread::Loop, || syscall(libc::SYS_socket, [1, 1, 0]), libc::SYS_socket);
        refused(Thread::Loop, || syscall(libc::SYS_openat, [0, 0, 0]), libc::SYS_openat);
        // `KVM_CREATE_VM`, and a request that the loop may make.
        refused(Thread::Loop, || syscall(libc::SYS_ioctl, [-1, 0xae01, 0]), libc::SYS_ioctl);
        refused(Thread::Vcpu, || syscall(libc::SYS_ioctl, [-1, 0xae41, 0]), libc::SYS_ioctl);
        refused(Thread::Vcpu, || syscall(libc::SYS_accept4, [-1, 0, 0]), libc::SYS_accept4);
    }

    #[test]
    fn what_is_on_the_list_works_threads_included() {
        let work = || {
            syscall(libc::SYS_ioctl, [-1, 0xae80, 0]);
            let thread = thread::Builder::new().name("another".into()).spawn(|| vec![1u8; 1 << 20].len());
            let length = thread.unwrap().join().unwrap();
            thread::sleep(std::time::Duration::from_millis(length as u64 >> 20));
        };
        for thread in [Thread::Loop, Thread::Vcpu] {
            let (code, text) = restricted(thread, work);
            assert_eq!((code, String::from_utf8_lossy(&text).as_ref()), (0, ""));
        }
    }
}
