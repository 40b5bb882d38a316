//! A vCPU: a thread that enters the guest, and passes the guest's accesses to
//! hardware on to the devices on the buses.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use husk_vmm_api::{ExitReason, VcpuReport};
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::console::Console;
use crate::devices::bus::Bus;
use crate::exit::ExitSignal;
use crate::jail::filter;
use crate::lock;

mod report;

/// Bytes of a thread's stack. Only touched pages cost memory.
const STACK: usize = 256 * 1024;
/// How many times a thread is kicked, a millisecond apart, before it counts as
/// stuck.
const KICKS: u32 = 1000;
/// Most time that a vCPU gets to report.
const REPORT_WAIT: Duration = Duration::from_millis(500);

/// Buses and signals that the vCPUs of a machine share.
pub struct VcpuContext {
    /// I/O ports.
    pub pio: Bus,
    /// Memory-mapped registers.
    pub mmio: Bus,
    /// Raised when a vCPU cannot continue.
    pub exit: Arc<ExitSignal>,
    /// The guest's console, which may name the reason of a reset.
    pub console: Console,
    /// When the first vCPU entered the guest for the first time.
    pub entered: OnceLock<Instant>,
}

/// A running vCPU.
pub struct Vcpu {
    thread: JoinHandle<VcpuFd>,
    orders: Arc<Orders>,
}

/// Orders for the vCPU's thread, which reads them between two entries into the guest.
#[derive(Default)]
struct Orders {
    /// Set when there are orders.
    any: AtomicBool,
    stop: AtomicBool,
    report: Mutex<Option<SyncSender<VcpuReport>>>,
}

impl Vcpu {
    /// Starts the thread of vCPU `index`.
    ///
    /// # Errors
    /// The host has no more threads.
    pub fn start(index: u8, fd: VcpuFd, context: Arc<VcpuContext>) -> io::Result<Self> {
        let orders = Arc::new(Orders::default());
        let received = Arc::clone(&orders);
        let thread = thread::Builder::new()
            .name(format!("husk-vcpu{index}"))
            .stack_size(STACK)
            .spawn(move || run(fd, &context, &received))?;
        Ok(Self { thread, orders })
    }

    /// Makes the vCPU leave the guest and ends its thread, so that it can be
    /// saved. `None` when it does not leave within a second.
    #[must_use]
    pub fn stop(self) -> Option<VcpuFd> {
        self.orders.stop.store(true, Ordering::SeqCst);
        self.orders.any.store(true, Ordering::SeqCst);
        for _ in 0..KICKS {
            if self.thread.is_finished() {
                return self.thread.join().ok();
            }
            self.kick();
            thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// Makes the vCPU leave the guest to report its state.
    #[must_use]
    pub fn report(&self) -> VcpuReport {
        let (sender, report) = mpsc::sync_channel(1);
        *lock(&self.orders.report) = Some(sender);
        self.orders.any.store(true, Ordering::SeqCst);
        let asked = Instant::now();
        while asked.elapsed() < REPORT_WAIT {
            self.kick();
            match report.recv_timeout(Duration::from_millis(1)) {
                Ok(report) => return report,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        VcpuReport::Gone
    }

    /// Signals the thread. A signal that arrives just before the thread enters
    /// the guest is lost, so the caller has to repeat it.
    fn kick(&self) {
        let _ = self.thread.kill(SIGRTMIN());
    }
}

/// Installs an empty handler for the signal of a kick, so that it interrupts
/// `KVM_RUN` and does nothing else.
///
/// # Errors
/// The kernel's.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).map_err(io::Error::from)
}

fn run(mut fd: VcpuFd, context: &VcpuContext, orders: &Orders) -> VcpuFd {
    if let Err(error) = filter::install(filter::Thread::Vcpu) {
        context.exit.raise(ExitReason::VmmError, error.to_string());
        return fd;
    }
    context.entered.get_or_init(Instant::now);
    loop {
        if orders.any.swap(false, Ordering::SeqCst) {
            if let Some(wanted) = lock(&orders.report).take() {
                // The thread that asked may not wait any more.
                let _ = wanted.try_send(report::report(&fd).unwrap_or(VcpuReport::Gone));
            }
            if orders.stop.load(Ordering::SeqCst) {
                // KVM takes the device's answer to the guest's last access when
                // the guest is entered again; this flag makes it return right
                // after that.
                fd.set_kvm_immediate_exit(1);
                let _ = fd.run();
                fd.set_kvm_immediate_exit(0);
                break;
            }
        }
        if let Err((reason, detail)) = enter(&mut fd, context) {
            context.exit.raise(reason, detail);
            break;
        }
    }
    fd
}

/// Enters the guest once. An error ends the machine.
fn enter(fd: &mut VcpuFd, context: &VcpuContext) -> Result<(), (ExitReason, String)> {
    let failed = |detail: String| Err((ExitReason::VmmError, detail));
    match fd.run() {
        Ok(VcpuExit::IoIn(port, data)) => context.pio.read(port.into(), data),
        Ok(VcpuExit::IoOut(port, data)) => context.pio.write(port.into(), data),
        Ok(VcpuExit::MmioRead(address, data)) => context.mmio.read(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => context.mmio.write(address, data),
        Ok(VcpuExit::Intr) => {}
        // The guest faulted while it handled a double fault (a triple fault).
        // Linux does that on purpose when no other way to reset has worked.
        Ok(VcpuExit::Shutdown) => return Err(context.console.reason_for_reset(ExitReason::TripleFault)),
        Ok(VcpuExit::SystemEvent(kind, _)) => {
            return Err(match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN => (ExitReason::Shutdown, String::new()),
                KVM_SYSTEM_EVENT_RESET => context.console.reason_for_reset(ExitReason::Reset),
                KVM_SYSTEM_EVENT_CRASH => (ExitReason::Panic, "the guest reported a crash".into()),
                other => (ExitReason::VmmError, format!("KVM reported the unknown system event {other}")),
            });
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return failed(format!(
                "the processor refused to enter the guest on CPU {cpu}: reason {reason:#x}"
            ));
        }
        Ok(VcpuExit::InternalError) => return failed(internal_error(fd)),
        Ok(VcpuExit::MemoryFault { gpa, .. }) => {
            return failed(format!("guest memory at {gpa:#x} cannot be used"));
        }
        Ok(other) => return failed(format!("KVM left the guest for an unexpected reason: {other:?}")),
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => {}
            libc::EFAULT => {
                return failed(
                    "the host could not provide guest memory (its kernel file may have changed)".into(),
                );
            }
            _ => return failed(format!("enter the guest: {error}")),
        },
    }
    Ok(())
}

/// KVM's own error, with the address of the instruction that caused it.
fn internal_error(fd: &mut VcpuFd) -> String {
    let rip = fd.get_regs().map(|regs| regs.rip).unwrap_or_default();
    // SAFETY: KVM fills this member of the union for KVM_EXIT_INTERNAL_ERROR,
    // and all its bit patterns are numbers.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let what = match internal.suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "could not emulate an instruction",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "met an exception while it delivered another",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "could not deliver an event",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "met an unknown exit of the processor",
        _ => "failed",
    };
    format!("KVM {what} (internal error {}) at guest address {rip:#x}", internal.suberror)
}
