//! Saves vCPUs and VMs and restores them, with a real KVM. No guest runs.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use husk_vmm::arch::x86_64::{cpuid, msr, regs};
use husk_vmm::hypervisor::Hypervisor;
use husk_vmm::memory;
use husk_vmm::snapshot::{format, vcpu, vm};
use kvm_ioctls::VcpuFd;
use serde::Serialize;

/// Registers that change by themselves: the TSC, and two clocks of the Hyper-V
/// interface.
const CLOCKS: [u32; 3] = [0x10, 0x4000_0010, 0x4000_0020];

fn machine(count: u8) -> (Hypervisor, Vec<VcpuFd>) {
    let hypervisor = Hypervisor::new().unwrap();
    let vcpus = (0..count).map(|index| hypervisor.create_vcpu(index).unwrap()).collect();
    (hypervisor, vcpus)
}

fn encoded<T: Serialize>(state: &T) -> Vec<u8> {
    let mut file = Vec::new();
    format::write(&mut file, state).unwrap();
    file
}

#[test]
#[ignore = "needs KVM, in a KVM host: see tests/README.md"]
fn a_restored_vcpu_has_the_registers_of_the_saved_one() {
    let (hypervisor, vcpus) = machine(2);
    let memory = memory::allocate(16, None).unwrap();
    hypervisor.set_memory(&memory).unwrap();
    let template = cpuid::Template::new(hypervisor.kvm(), 2).unwrap();
    for (index, vcpu) in (0..).zip(&vcpus) {
        vcpu.set_cpuid2(&template.for_vcpu(index).unwrap()).unwrap();
        msr::set_boot_values(vcpu).unwrap();
    }
    regs::set_entry(&vcpus[0], &memory, 0x12_3456).unwrap();

    let (other, twins) = machine(2);
    for (vcpu, twin) in vcpus.iter().zip(&twins) {
        let file = encoded(&vcpu::save(hypervisor.kvm(), vcpu).unwrap());
        vcpu::restore(twin, &format::read(file.as_slice()).unwrap()).unwrap();
        assert_eq!(twin.get_regs().unwrap(), vcpu.get_regs().unwrap());
        assert_eq!(twin.get_sregs().unwrap(), vcpu.get_sregs().unwrap());
        assert_eq!(twin.get_mp_state().unwrap(), vcpu.get_mp_state().unwrap());
        assert_eq!(twin.get_lapic().unwrap(), vcpu.get_lapic().unwrap());
        let fixed = |kvm: &Hypervisor, vcpu: &VcpuFd| -> Vec<(u32, u64)> {
            let all = msr::read_all(kvm.kvm(), vcpu).unwrap();
            all.iter().filter(|msr| !CLOCKS.contains(&msr.index)).map(|msr| (msr.index, msr.data)).collect()
        };
        assert!(fixed(&other, twin).contains(&(0x2ff, 0x806)), "the memory types were saved");
        assert_eq!(fixed(&other, twin), fixed(&hypervisor, vcpu));
    }
    assert_eq!(twins[0].get_regs().unwrap().rip, 0x12_3456);
}

#[test]
#[ignore = "needs KVM, in a KVM host: see tests/README.md"]
fn a_restored_vm_has_the_interrupt_controllers_of_the_saved_one() {
    let (hypervisor, _vcpus) = machine(1);
    hypervisor.vm().set_irq_line(7, true).unwrap();
    let saved = vm::save(hypervisor.vm()).unwrap();
    let (other, _twins) = machine(1);
    assert_ne!(chips(&vm::save(other.vm()).unwrap()), chips(&saved));
    vm::restore(other.vm(), &format::read(encoded(&saved).as_slice()).unwrap()).unwrap();
    assert_eq!(chips(&vm::save(other.vm()).unwrap()), chips(&saved));
}

fn chips(state: &vm::VmState) -> Vec<u8> {
    encoded(&state.chips())
}
