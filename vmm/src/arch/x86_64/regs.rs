//! The registers of the first vCPU at the kernel's 64-bit entry point. The
//! others wait for a start-up IPI, as KVM makes them.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestMemoryMmap};
use zerocopy::IntoBytes;

use super::layout::{BOOT_PARAMS, BOOT_STACK, GDT, PML4};

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Descriptors in the order of their selectors (Intel SDM vol. 3, 3.4.5):
/// two nulls, 64-bit code, flat data, busy 64-bit task state (its upper half
/// follows).
const DESCRIPTORS: [u64; 6] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff, 0];

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The one bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// The registers of the first vCPU cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// Guest memory is too small.
    #[error("write the GDT: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// KVM refused.
    #[error("set registers: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
}

/// Sets the vCPU to start at `entry` in 64-bit mode, with interrupts off and
/// the boot parameters in RSI.
///
/// # Errors
/// [`RegsError`].
pub fn set_entry(vcpu: &VcpuFd, memory: &GuestMemoryMmap, entry: u64) -> Result<(), RegsError> {
    memory.write_slice(DESCRIPTORS.as_bytes(), GDT)?;

    let mut sregs = vcpu.get_sregs()?;
    sregs.gdt.base = GDT.0;
    sregs.gdt.limit = (std::mem::size_of_val(&DESCRIPTORS) - 1) as u16;
    sregs.cs = segment(CODE_SELECTOR, 0xb);
    sregs.cs.l = 1;
    let data = segment(DATA_SELECTOR, 0x3);
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *register = kvm_segment { db: 1, ..data };
    }
    sregs.tr = kvm_segment { s: 0, ..segment(TASK_SELECTOR, 0xb) };
    sregs.cr3 = PML4.0;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)?;

    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsi: BOOT_PARAMS.0,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    })?;
    Ok(())
}

/// A flat segment of 4 GiB in privilege level 0.
fn segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}
