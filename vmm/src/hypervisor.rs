//! KVM, and the one VM that this process has.

use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::interrupts;

const API_VERSION: i32 = 12;

/// A call to KVM failed.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// `/dev/kvm` cannot be opened.
    #[error("open /dev/kvm: {0} (`husk check` says what this host lacks)")]
    Open(#[source] kvm_ioctls::Error),
    /// The host's KVM has another version of its interface.
    #[error("KVM has API version {0}, {API_VERSION} is needed")]
    Version(i32),
    /// An ioctl failed.
    #[error("{what}: {cause}")]
    Call {
        /// The purpose of the call, "create a VM".
        what: &'static str,
        /// The error that KVM returned.
        cause: kvm_ioctls::Error,
    },
}

/// Makes an error of the call with this purpose.
fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> HypervisorError {
    move |cause| HypervisorError::Call { what, cause }
}

/// An empty VM. Making one is the slowest part of a start and needs no
/// knowledge of the machine, so it is made before the request to boot comes.
pub struct Hypervisor {
    kvm: Kvm,
    vm: VmFd,
}

impl Hypervisor {
    /// Makes a VM with interrupt controllers, and nothing else.
    ///
    /// # Errors
    /// [`HypervisorError`].
    pub fn new() -> Result<Self, HypervisorError> {
        let kvm = Kvm::new().map_err(HypervisorError::Open)?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(HypervisorError::Version(version));
        }
        let vm = kvm.create_vm().map_err(call("create a VM"))?;
        interrupts::create(&vm).map_err(call("create the interrupt controllers"))?;
        Ok(Self { kvm, vm })
    }

    /// The handle of `/dev/kvm`.
    #[must_use]
    pub const fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The handle of the VM.
    #[must_use]
    pub const fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Most vCPUs that this host allows for a VM.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.vm.check_extension_int(Cap::MaxVcpus).try_into().unwrap_or(0)
    }

    /// Gives the VM its memory.
    ///
    /// # Errors
    /// [`HypervisorError::Call`].
    pub fn set_memory(&self, memory: &GuestMemoryMmap) -> Result<(), HypervisorError> {
        for (slot, region) in memory.iter().enumerate() {
            let region = kvm_bindings::kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is mapped, and `memory` is kept for as long
            // as the VM: both live until the process ends.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(call("give the VM its memory"))?;
        }
        Ok(())
    }

    /// Makes vCPU `index`.
    ///
    /// # Errors
    /// [`HypervisorError::Call`].
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, HypervisorError> {
        self.vm.create_vcpu(index.into()).map_err(call("create a vCPU"))
    }

    /// Connects an eventfd to an input of the I/O APIC.
    ///
    /// # Errors
    /// [`HypervisorError::Call`].
    pub fn connect_interrupt(&self, line: &EventFd, irq: u32) -> Result<(), HypervisorError> {
        self.vm.register_irqfd(line, irq).map_err(call("connect an interrupt"))
    }

    /// Makes a guest's write of `value` (32 bits) to `address` write to an
    /// eventfd, without leaving the kernel.
    ///
    /// # Errors
    /// [`HypervisorError::Call`].
    pub fn connect_notification(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), HypervisorError> {
        let address = IoEventAddress::Mmio(address);
        self.vm.register_ioevent(event, &address, value).map_err(call("connect a notification"))
    }
}
