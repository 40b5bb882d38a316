//! Checks whether KVM can run a guest's kernel.
//!
//! A KVM without hardware behind it opens, answers and creates machines like
//! any other, but executes the instructions of a guest's kernel in software,
//! some hundred times slower, and not all of them. So a tiny machine is made
//! and timed: it runs a loop in ring 0 of 64-bit mode, the way a kernel runs.

use std::fmt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};

use super::report::Finding;

/// Instructions per second that tell execution from emulation: hardware does
/// billions, a QEMU that emulates the whole machine some tens of millions even
/// when it is busy, and an emulating KVM about two millions.
const ENOUGH: f64 = 10e6;

/// The time limit of the tiny machine.
const DEADLINE: Duration = Duration::from_secs(10);

/// Rounds of the loop, and instructions of one round.
const ROUNDS: u32 = 100_000;
const ROUND: f64 = 4.0;

/// The machine's memory: page tables from 0x1000 on, then code, then data.
const MEMORY: usize = 0x10000;
const TABLES: usize = 0x1000;
const LOOP_AT: usize = 0x4000;
const SAMPLE_AT: usize = 0x5000;
const DATA: usize = 0x8000;

/// The capabilities that `husk-vmm` needs.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::SetTssAddr, "TSS address"),
    (Cap::ExtCpuid, "CPUID"),
    (Cap::AdjustClock, "guest clock"),
    (Cap::ImmediateExit, "immediate exit"),
];

const ELSEWHERE: &str = "use a machine with KVM, or a KVM host VM: make kvm-shell";

/// Opens `/dev/kvm` and tries it out.
pub fn check() -> Finding {
    match try_out() {
        Ok(speed) if speed >= ENOUGH => {
            Finding::Ok(format!("/dev/kvm runs guest kernels ({:.0} million instructions/s)", speed / 1e6))
        }
        Ok(speed) => Finding::missing(
            format!(
                "/dev/kvm only emulates guest kernels ({:.1} million instructions/s, {:.0} are needed)",
                speed / 1e6,
                ENOUGH / 1e6
            ),
            ELSEWHERE,
        ),
        Err(problem) => {
            let fix = problem.fix();
            Finding::missing(problem.to_string(), fix)
        }
    }
}

enum Problem {
    Open(kvm_ioctls::Error),
    Version(i32),
    Lacks(Vec<&'static str>),
    Make(&'static str, kvm_ioctls::Error),
    Stopped(String),
    Wrong(u64),
    Deadline,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(error) => write!(f, "/dev/kvm cannot be opened: {error}"),
            Self::Version(version) => write!(f, "/dev/kvm speaks version {version} and not 12"),
            Self::Lacks(what) => write!(f, "/dev/kvm lacks: {}", what.join(", ")),
            Self::Make(step, error) => write!(f, "/dev/kvm opens, but {step} fails: {error}"),
            Self::Stopped(exit) => write!(f, "/dev/kvm cannot execute a guest kernel's instructions: {exit}"),
            Self::Wrong(got) => write!(f, "/dev/kvm executes a guest kernel wrongly: 10 became {got}"),
            Self::Deadline => {
                write!(f, "/dev/kvm did not finish a short loop within {} s", DEADLINE.as_secs())
            }
        }
    }
}

impl Problem {
    fn fix(&self) -> &'static str {
        match self {
            Self::Open(error) if error.errno() == libc::EACCES => "run as root, or: usermod -aG kvm $USER",
            Self::Open(error) if error.errno() == libc::ENOENT => {
                "switch on virtualization in the firmware and: modprobe kvm_intel || modprobe kvm_amd"
            }
            Self::Make(_, error) if error.errno() == libc::EBUSY => {
                "stop the other hypervisor that uses the processor's virtualization"
            }
            _ => ELSEWHERE,
        }
    }
}

fn try_out() -> Result<f64, Problem> {
    let kvm = Kvm::new().map_err(Problem::Open)?;
    if kvm.get_api_version() != 12 {
        return Err(Problem::Version(kvm.get_api_version()));
    }
    let lacks: Vec<_> =
        NEEDED.into_iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| name).collect();
    if !lacks.is_empty() {
        return Err(Problem::Lacks(lacks));
    }
    let (answer, answered) = mpsc::channel();
    // A guest that hangs hangs this thread with it; both end with the process.
    std::thread::spawn(move || answer.send(measure(&kvm)));
    answered.recv_timeout(DEADLINE).unwrap_or(Err(Problem::Deadline))
}

/// Instructions per second, at best: another process may get in between.
fn measure(kvm: &Kvm) -> Result<f64, Problem> {
    let mut machine = Machine::new(kvm)?;
    let sum = machine.execute(SAMPLE_AT, 0)?.0;
    if sum != 10 {
        return Err(Problem::Wrong(sum));
    }
    let mut best = 0f64;
    for _ in 0..4 {
        let (_, time) = machine.execute(LOOP_AT, ROUNDS)?;
        best = best.max(f64::from(ROUNDS) * ROUND / time.as_secs_f64().max(1e-9));
        if best >= ENOUGH {
            break;
        }
    }
    Ok(best)
}

/// A loop over the count in ecx with instructions that only ring 0 may use.
#[rustfmt::skip]
const LOOP: &[u8] = &[
    0xfa,                         // 1: cli
    0xfb,                         //    sti
    0xff, 0xc9,                   //    dec ecx
    0x75, 0xfa,                   //    jnz 1b
    0xf4,                         //    hlt
];

/// Some instructions that kernels use and emulators tend to lack. Data is at
/// [rsi]; eax is 10 at the end.
#[rustfmt::skip]
const SAMPLE: &[u8] = &[
    0x31, 0xc0,                   // xor eax, eax
    0x31, 0xd2,                   // xor edx, edx
    0x31, 0xc9,                   // xor ecx, ecx
    0xbb, 5, 0, 0, 0,             // mov ebx, 5
    0xf0, 0x48, 0x0f, 0xc7, 0x0e, // lock cmpxchg16b [rsi]
    0x8b, 0x06,                   // mov eax, [rsi]
    0x66, 0x0f, 0x6e, 0xc0,       // movd xmm0, eax
    0x66, 0x0f, 0xfe, 0xc0,       // paddd xmm0, xmm0
    0x66, 0x0f, 0x7e, 0xc0,       // movd eax, xmm0
    0xf4,                         // hlt
];

#[repr(align(4096))]
struct Memory([u8; MEMORY]);

/// One vCPU in 64-bit mode. Fields are dropped in this order, so the memory
/// outlives the machine.
struct Machine {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: Box<Memory>,
}

impl Machine {
    fn new(kvm: &Kvm) -> Result<Self, Problem> {
        let mut memory = Box::new(Memory([0; MEMORY]));
        // One 2 MiB page at address 0, present and writable; see the AMD64
        // manual, volume 2, section 5.3.
        let tables = [
            (TABLES, (TABLES + 0x1000) | 3),
            (TABLES + 0x1000, (TABLES + 0x2000) | 3),
            (TABLES + 0x2000, 0x83),
        ];
        for (at, entry) in tables {
            memory.put(at, &(entry as u64).to_le_bytes());
        }
        memory.put(LOOP_AT, LOOP);
        memory.put(SAMPLE_AT, SAMPLE);
        let make = |step| move |error| Problem::Make(step, error);
        let vm = kvm.create_vm().map_err(make("creating a machine"))?;
        vm.set_tss_address(0xfffb_d000).map_err(make("placing the TSS"))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.0.as_mut_ptr() as u64,
        };
        // SAFETY: the region is the whole of `memory`, which is page-aligned,
        // is kept in place by its box, and is freed after the machine.
        unsafe { vm.set_user_memory_region(region) }.map_err(make("giving it memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(make("creating a vCPU"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(make("reading CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(make("setting CPUID"))?;
        let mut sregs = vcpu.get_sregs().map_err(make("reading registers"))?;
        let segment = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
        sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..segment };
        let data = kvm_segment { selector: 16, type_: 3, db: 1, ..segment };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr3 = TABLES as u64;
        // PAE, and SSE with its exceptions.
        sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
        // Protection, monitor of the coprocessor, its type, paging.
        sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 31;
        // Long mode, enabled and active.
        sregs.efer = 1 << 8 | 1 << 10;
        vcpu.set_sregs(&sregs).map_err(make("setting registers"))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// Executes the code at an address until it halts; answers rax and the time
    /// it took.
    fn execute(&mut self, at: usize, count: u32) -> Result<(u64, Duration), Problem> {
        let regs = kvm_regs {
            rip: at as u64,
            rsi: DATA as u64,
            rsp: MEMORY as u64,
            rcx: u64::from(count),
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).map_err(|error| Problem::Make("setting registers", error))?;
        let start = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => break,
                Ok(exit) => return Err(Problem::Stopped(format!("{exit:?}"))),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(Problem::Make("running it", error)),
            }
        }
        let time = start.elapsed();
        let regs = self.vcpu.get_regs().map_err(|error| Problem::Make("reading registers", error))?;
        Ok((regs.rax, time))
    }
}

impl Memory {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
}
