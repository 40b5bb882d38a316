//! The state of a vCPU, for finding the reason that a guest hangs.

use husk_vmm_api::VcpuReport;
use kvm_bindings::{KVM_MP_STATE_HALTED, kvm_lapic_state};
use kvm_ioctls::VcpuFd;

use crate::arch::x86_64::msr;

/// Offsets in the local APIC's page of the registers of interrupts in service
/// and requested.
const LAPIC_ISR: usize = 0x100;
const LAPIC_IRR: usize = 0x200;

/// Reads the vCPU's state, on its own thread. `None` when KVM refuses.
pub fn report(vcpu: &VcpuFd) -> Option<VcpuReport> {
    let mp_state = vcpu.get_mp_state().ok()?;
    let regs = vcpu.get_regs().ok()?;
    let lapic = vcpu.get_lapic().ok()?;
    let [timer, tsc] = msr::read(vcpu, [msr::TSC_DEADLINE, msr::TSC]).ok()?;
    Some(VcpuReport::Seen {
        halted: mp_state.mp_state == KVM_MP_STATE_HALTED,
        rip: regs.rip,
        rsp: regs.rsp,
        rflags: regs.rflags,
        requested: vectors(&lapic, LAPIC_IRR),
        in_service: vectors(&lapic, LAPIC_ISR),
        timer,
        tsc,
    })
}

/// The vectors in one of the local APIC's 256-bit registers: eight words of 32
/// bits, 16 bytes apart.
fn vectors(lapic: &kvm_lapic_state, register: usize) -> Vec<u8> {
    (0..=u8::MAX)
        .filter(|vector| {
            let (word, bit) = (usize::from(vector / 32), vector % 32);
            let byte = register + word * 16 + usize::from(bit / 8);
            lapic.regs.get(byte).is_some_and(|value| value.cast_unsigned() >> (bit % 8) & 1 == 1)
        })
        .collect()
}
