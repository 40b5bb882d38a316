//! The guest-physical address map.
//!
//! ```text
//! 0x0000_6000  GDT, then the kernel's command line
//! 0x0000_7000  boot_params (the "zero page")
//! 0x0000_8000  page tables: PML4, PDPT, PD
//! 0x0009_f000  MP table; reserved to the end of the first 640 KiB
//! 0x0010_0000  the kernel, wherever its ELF segments want to be
//!    ..        memory, up to 3 GiB
//! 0xc000_0000  virtio-mmio devices, one page each
//! 0xfec0_0000  IOAPIC
//! 0xfee0_0000  local APICs
//! 0xfffb_d000  three pages that KVM wants on Intel for real mode
//! 0x1_0000_0000  the rest of memory
//!    ..        persistent memory, from the next full GiB
//! ```

use vm_memory::GuestAddress;

/// A range of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first address of the range.
    pub start: GuestAddress,
    /// Bytes of the range.
    pub size: u64,
}

impl Range {
    /// The address behind the range.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start.0 + self.size
    }
}

/// The four descriptors that the boot protocol demands.
pub const GDT: GuestAddress = GuestAddress(0x6000);
/// The kernel's command line, on the same page as the GDT.
pub const CMDLINE: GuestAddress = GuestAddress(0x6800);
/// Longest command line with its NUL (Linux' `COMMAND_LINE_SIZE` on x86).
pub const CMDLINE_MAX: usize = 2048;
/// `struct boot_params`.
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// Page tables that map the first GiB to itself.
pub const PML4: GuestAddress = GuestAddress(0x8000);
/// The second level of the page tables.
pub const PDPT: GuestAddress = GuestAddress(0x9000);
/// The third level of the page tables, with 2 MiB pages.
pub const PD: GuestAddress = GuestAddress(0xa000);
/// The end of the memory that the page tables map.
pub const IDENTITY_MAPPED: u64 = 1 << 30;
/// The stack pointer at the entry point; the kernel sets its own at once.
pub const BOOT_STACK: u64 = 0x5ff0;

/// The MP configuration table. Usable low memory ends here.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_f000);
/// The MP floating pointer. Linux searches the last KiB below 640 KiB for it.
pub const MP_POINTER: GuestAddress = GuestAddress(0x9_fc00);
/// End of the low memory; video memory and BIOS follow on a PC.
pub const LOW_MEMORY_END: u64 = 0xa_0000;
/// The address at which memory continues: the lowest one for a kernel.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Start of the hole in memory for devices.
pub const GAP_START: u64 = 0xc000_0000;
/// End of the hole.
pub const GAP_END: u64 = 0x1_0000_0000;

/// The registers of the first virtio-mmio device.
pub const VIRTIO_MMIO: u64 = GAP_START;
/// Bytes of one virtio-mmio device's registers.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// The I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// The address for `KVM_SET_TSS_ADDR`: pages below the 4 GiB line that nothing
/// else uses.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The I/O APIC input of the first serial port, as on every PC.
pub const SERIAL_IRQ: u32 = 4;
/// The first I/O APIC input for virtio devices; the lower ones belong to the
/// PC.
pub const FIRST_VIRTIO_IRQ: u32 = 5;
/// The last input of KVM's I/O APIC.
pub const LAST_IRQ: u32 = 23;
/// Most virtio devices: each has an interrupt line of its own, because KVM
/// merges simultaneous pulses of two irqfds on one edge-triggered line.
pub const MAX_VIRTIO_DEVICES: usize = (LAST_IRQ - FIRST_VIRTIO_IRQ + 1) as usize;

/// Most vCPUs.
pub const MAX_VCPUS: u8 = 64;

/// The I/O port of the first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The I/O port of the keyboard controller, whose reset line Linux pulls.
pub const I8042_PORT: u16 = 0x60;
