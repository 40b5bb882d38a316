//! The in-kernel interrupt controllers, and the parts of a PC that are left
//! out.
//!
//! KVM's local APICs, I/O APIC and 8259s are created with the VM. There is no
//! PIT: the guest has kvm-clock, which gives it its TSC's frequency, and the
//! APIC's TSC-deadline timer for ticks, so Linux never asks for one
//! (`apic_needs_pit()`), and a PIT would cost a kernel thread per VM. The local
//! APICs' LINT0 and LINT1 keep their reset values: KVM lets the first vCPU's
//! LINT0 accept the 8259's interrupts, and Linux sets both up again
//! (`setup_local_APIC()`) before it enables an interrupt.

use kvm_ioctls::VmFd;

use super::layout::KVM_TSS;

/// Creates the interrupt controllers. Must be called before any vCPU is made,
/// which would lack its local APIC otherwise.
///
/// # Errors
/// KVM's.
pub fn create(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    // Intel processors without "unrestricted guest" need a TSS to run real
    // mode.
    vm.set_tss_address(KVM_TSS)?;
    vm.create_irq_chip()
}
