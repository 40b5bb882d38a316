//! The state of a vCPU. Its thread must not be in the guest.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::arch::x86_64::msr::{self, MsrError};

/// The version of [`VcpuState`].
const VERSION: u16 = 1;

/// A saved vCPU.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    version: u16,
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

/// A vCPU cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// The state was saved by another version.
    #[error("vCPU state of version {0} is not supported")]
    Version(u16),
    /// KVM refused a call.
    #[error("{what}: {cause}")]
    Kvm {
        /// The purpose of the call, "read registers".
        what: &'static str,
        /// The error that KVM returned.
        cause: kvm_ioctls::Error,
    },
    /// A model-specific register cannot be read or written.
    #[error(transparent)]
    Msr(#[from] MsrError),
    /// The state has more `cpuid` leaves than KVM accepts.
    #[error("the saved processor describes itself in too many leaves")]
    TooManyLeaves,
}

/// Makes an error of the call with this purpose.
fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuStateError {
    move |cause| VcpuStateError::Kvm { what, cause }
}

/// Reads the vCPU. The order matters: reading the run state makes KVM finish
/// what is pending, and events are read last, when nothing changes them any
/// more.
///
/// # Errors
/// [`VcpuStateError`].
pub fn save(kvm: &Kvm, vcpu: &VcpuFd) -> Result<VcpuState, VcpuStateError> {
    let mp_state = vcpu.get_mp_state().map_err(call("read the run state"))?;
    let regs = vcpu.get_regs().map_err(call("read registers"))?;
    let sregs = vcpu.get_sregs().map_err(call("read system registers"))?;
    let xsave = vcpu.get_xsave().map_err(call("read vector registers"))?;
    let xcrs = vcpu.get_xcrs().map_err(call("read extended control registers"))?;
    let debug_regs = vcpu.get_debug_regs().map_err(call("read debug registers"))?;
    let lapic = vcpu.get_lapic().map_err(call("read the local APIC"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(call("read the TSC's frequency"))?;
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(call("read cpuid"))?.as_slice().to_vec();
    let msrs = msr::read_all(kvm, vcpu)?;
    let events = vcpu.get_vcpu_events().map_err(call("read pending events"))?;
    Ok(VcpuState {
        version: VERSION,
        cpuid,
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        lapic,
        msrs,
        events,
        tsc_khz,
    })
}

/// Puts a saved state into a fresh vCPU. `cpuid` determines which registers
/// exist, so it is restored first. The local APIC comes before the
/// model-specific registers, because one of those arms its timer.
///
/// # Errors
/// [`VcpuStateError`].
pub fn restore(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
    if state.version != VERSION {
        return Err(VcpuStateError::Version(state.version));
    }
    let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| VcpuStateError::TooManyLeaves)?;
    vcpu.set_cpuid2(&cpuid).map_err(call("write cpuid"))?;
    if vcpu.get_tsc_khz().map_err(call("read the TSC's frequency"))? != state.tsc_khz {
        vcpu.set_tsc_khz(state.tsc_khz).map_err(call("write the TSC's frequency"))?;
    }
    vcpu.set_mp_state(state.mp_state).map_err(call("write the run state"))?;
    vcpu.set_regs(&state.regs).map_err(call("write registers"))?;
    vcpu.set_sregs(&state.sregs).map_err(call("write system registers"))?;
    // SAFETY: the area has the 4 KiB that KVM reads for all features that a
    // process has not asked extra permission for (AMX is one of those).
    unsafe { vcpu.set_xsave(&state.xsave) }.map_err(call("write vector registers"))?;
    vcpu.set_xcrs(&state.xcrs).map_err(call("write extended control registers"))?;
    vcpu.set_debug_regs(&state.debug_regs).map_err(call("write debug registers"))?;
    vcpu.set_lapic(&state.lapic).map_err(call("write the local APIC"))?;
    msr::write(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events).map_err(call("write pending events"))
}
