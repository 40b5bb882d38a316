//! The MP table (Intel MultiProcessor Specification 1.4), from which a kernel
//! without ACPI learns the processors and the I/O APIC's inputs.

use vm_memory::{Bytes, GuestMemoryMmap};

use super::layout::{IOAPIC, LAPIC, LAST_IRQ, MP_POINTER, MP_TABLE};

const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// The CPUID.1:EDX bits that the specification demands here: FPU and APIC.
const CPU_FEATURES: u32 = 0x201;
const CPU_SIGNATURE: u32 = 0x600;
const HEADER_LENGTH: usize = 44;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const TYPE_INT: u8 = 0;
const TYPE_NMI: u8 = 1;
const TYPE_EXTINT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;
const ISA_BUS: u8 = 0;

/// Writes the table for `vcpus` processors.
///
/// # Errors
/// Guest memory is too small.
pub fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(&table(vcpus), MP_TABLE)?;
    memory.write_slice(&pointer(), MP_POINTER)
}

/// The floating pointer structure (specification 4.1).
fn pointer() -> [u8; 16] {
    let mut pointer = [0u8; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(MP_TABLE.0 as u32).to_le_bytes());
    pointer[8] = 1; // length in units of 16 bytes
    pointer[9] = SPEC_1_4;
    pointer[10] = checksum(&pointer);
    pointer
}

/// The configuration table (specification 4.2 and 4.3).
fn table(vcpus: u8) -> Vec<u8> {
    // The I/O APIC's id comes after the processors', because Linux demands a
    // unique one.
    let ioapic_id = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { CPU_ENABLED | CPU_BOOT } else { CPU_ENABLED };
        let mut processor = [0u8; 20];
        processor[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, flags]);
        processor[4..8].copy_from_slice(&CPU_SIGNATURE.to_le_bytes());
        processor[8..12].copy_from_slice(&CPU_FEATURES.to_le_bytes());
        add(&processor);
    }
    add(&[ENTRY_BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = [ENTRY_IOAPIC, ioapic_id, APIC_VERSION, 1, 0, 0, 0, 0];
    ioapic[4..].copy_from_slice(&IOAPIC.to_le_bytes());
    add(&ioapic);
    // Flags 0 mean "as the bus specifies", which for ISA is edge-triggered and
    // active high.
    for irq in 0..=LAST_IRQ as u8 {
        add(&[ENTRY_INTERRUPT, TYPE_INT, 0, 0, ISA_BUS, irq, ioapic_id, irq]);
    }
    add(&[ENTRY_LOCAL_INTERRUPT, TYPE_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[ENTRY_LOCAL_INTERRUPT, TYPE_NMI, 0, 0, ISA_BUS, 0, ALL_LAPICS, 1]);

    let mut table = vec![0u8; HEADER_LENGTH];
    let length = (HEADER_LENGTH + entries.len()) as u16;
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&length.to_le_bytes());
    table[6] = SPEC_1_4;
    table[8..16].copy_from_slice(b"HUSK    ");
    table[16..28].copy_from_slice(b"MICROVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LAPIC.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes all bytes sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// The largest table must fit into the space before its pointer.
const _: () = assert!(
    HEADER_LENGTH + super::layout::MAX_VCPUS as usize * 20 + (2 + LAST_IRQ as usize + 1 + 2) * 8
        <= (MP_POINTER.0 - MP_TABLE.0) as usize
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout::MAX_VCPUS;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_structures_sum_to_zero() {
        assert_eq!(sum(&pointer()), 0);
        for vcpus in [1, 2, MAX_VCPUS] {
            assert_eq!(sum(&table(vcpus)), 0);
        }
    }

    #[test]
    fn one_boot_processor_among_all() {
        let table = table(64);
        let processors: Vec<&[u8]> = table[HEADER_LENGTH..].chunks(20).take(64).collect();
        assert!(processors.iter().all(|p| p[0] == ENTRY_PROCESSOR && p[3] & CPU_ENABLED != 0));
        assert_eq!(processors.iter().filter(|p| p[3] & CPU_BOOT != 0).count(), 1);
        assert_eq!(processors.last().unwrap()[1], 63);
    }

    #[test]
    fn lengths_and_counts_are_what_the_header_says() {
        let table = table(3);
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        let mut rest = &table[HEADER_LENGTH..];
        let mut count = 0;
        while !rest.is_empty() {
            rest = &rest[if rest[0] == ENTRY_PROCESSOR { 20 } else { 8 }..];
            count += 1;
        }
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), count);
    }
}
