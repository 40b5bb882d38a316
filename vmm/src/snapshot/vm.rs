//! The state of a VM besides its vCPUs, memory and devices.

use kvm_bindings::{
    KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// The version of [`VmState`].
const VERSION: u16 = 1;
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// A saved VM: its interrupt controllers and its clock. A machine has no PIT.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    version: u16,
    chips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

impl VmState {
    /// The interrupt controllers, in KVM's own layout.
    #[must_use]
    pub fn chips(&self) -> &[kvm_irqchip] {
        &self.chips
    }
}

/// A VM cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VmStateError {
    /// The state was saved by another version.
    #[error("VM state of version {0} is not supported")]
    Version(u16),
    /// The state has other interrupt controllers than a machine has.
    #[error("the saved VM has other interrupt controllers")]
    OtherChips,
    /// KVM refused a call.
    #[error("{what}: {cause}")]
    Kvm {
        /// The purpose of the call, "read the clock".
        what: &'static str,
        /// The error that KVM returned.
        cause: kvm_ioctls::Error,
    },
}

/// Makes an error of the call with this purpose.
fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmStateError {
    move |cause| VmStateError::Kvm { what, cause }
}

/// Reads the VM's state. Its vCPUs must have stopped.
///
/// # Errors
/// [`VmStateError::Kvm`].
pub fn save(vm: &VmFd) -> Result<VmState, VmStateError> {
    let mut chips = Vec::with_capacity(CHIPS.len());
    for chip_id in CHIPS {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(call("read an interrupt controller"))?;
        chips.push(chip);
    }
    let mut clock = vm.get_clock().map_err(call("read the clock"))?;
    // KVM reports this flag, and refuses to set it.
    clock.flags &= !KVM_CLOCK_TSC_STABLE;
    Ok(VmState { version: VERSION, chips, clock })
}

/// Puts a saved state into a fresh VM, after its vCPUs were restored.
///
/// # Errors
/// [`VmStateError`].
pub fn restore(vm: &VmFd, state: &VmState) -> Result<(), VmStateError> {
    if state.version != VERSION {
        return Err(VmStateError::Version(state.version));
    }
    if !state.chips.iter().map(|chip| chip.chip_id).eq(CHIPS) {
        return Err(VmStateError::OtherChips);
    }
    for chip in &state.chips {
        vm.set_irqchip(chip).map_err(call("write an interrupt controller"))?;
    }
    vm.set_clock(&state.clock).map_err(call("write the clock"))
}
