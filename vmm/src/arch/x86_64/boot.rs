//! The data that the kernel expects in memory when it starts (Linux
//! `Documentation/arch/x86/boot.rst`, "64-bit boot protocol").

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

use super::layout::{
    BOOT_PARAMS, CMDLINE, CMDLINE_MAX, HIGH_MEMORY, LOW_MEMORY_END, MP_TABLE, PD, PDPT, PML4, Range,
};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// `boot_flag` and `header` of every kernel since boot protocol 2.00.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// "Undefined" boot loader: one without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// Page table entry bits.
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

/// The boot information could not be written.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Guest memory is too small for the boot information.
    #[error("write boot information: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The command line has more than [`CMDLINE_MAX`] bytes.
    #[error("kernel command line of {0} bytes is longer than {max}", max = CMDLINE_MAX - 1)]
    CmdlineTooLong(usize),
}

/// Writes the command line, `boot_params` and the page tables. `boot_params`
/// tells the kernel only of the ranges `ram` of `memory`.
///
/// # Errors
/// [`BootError`].
pub fn write(memory: &GuestMemoryMmap, ram: &[Range], cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong(cmdline.len()));
    }
    memory.write_slice(cmdline.as_bytes(), CMDLINE)?;
    memory.write_obj(0u8, GuestAddress(CMDLINE.0 + cmdline.len() as u64))?;
    write_boot_params(memory, ram, cmdline.len())?;
    write_page_tables(memory)?;
    Ok(())
}

fn write_boot_params(
    memory: &GuestMemoryMmap,
    ram: &[Range],
    cmdline_length: usize,
) -> Result<(), BootError> {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    params.hdr.cmdline_size = cmdline_length as u32;
    params.hdr.kernel_alignment = 0x0100_0000;
    let map = memory_map(ram);
    params.e820_entries = map.len() as u8;
    for (entry, slot) in map.into_iter().zip(params.e820_table.iter_mut()) {
        *slot = entry;
    }
    // SAFETY: boot_params is a packed, plain C structure without padding that
    // was zeroed when it was made; reading its bytes is always defined.
    let bytes = unsafe {
        std::slice::from_raw_parts((&raw const params).cast::<u8>(), std::mem::size_of::<boot_params>())
    };
    memory.write_slice(bytes, BOOT_PARAMS)?;
    Ok(())
}

/// The e820 map: low memory up to the MP table, and all memory from 1 MiB on.
fn memory_map(ram: &[Range]) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind| boot_e820_entry { addr: start, size: end - start, r#type: kind };
    let mut map = vec![entry(0, MP_TABLE.0, E820_RAM), entry(MP_TABLE.0, LOW_MEMORY_END, E820_RESERVED)];
    for range in ram {
        let start = range.start.0.max(HIGH_MEMORY);
        if range.end() > start {
            map.push(entry(start, range.end(), E820_RAM));
        }
    }
    map
}

/// Maps the first GiB to itself, in 2 MiB pages, which every processor
/// supports.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    memory.write_obj(PDPT.0 | PRESENT_WRITABLE, PML4)?;
    memory.write_obj(PD.0 | PRESENT_WRITABLE, PDPT)?;
    let entries: [u64; 512] = std::array::from_fn(|i| (i as u64) << 21 | LARGE_PAGE | PRESENT_WRITABLE);
    memory.write_slice(entries.as_bytes(), PD)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn the_memory_map_covers_what_there_is_and_leaves_the_holes_out() {
        let map: Vec<_> = memory_map(&memory::ram(4096))
            .into_iter()
            .map(|e| ({ e.addr }, { e.size }, { e.r#type }))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_f000, E820_RAM),
                (0x9_f000, 0x1000, E820_RESERVED),
                (0x10_0000, 0xc000_0000 - 0x10_0000, E820_RAM),
                (0x1_0000_0000, 1 << 30, E820_RAM),
            ]
        );
    }

    #[test]
    fn the_kernel_finds_its_command_line_through_the_boot_parameters() {
        let memory = memory::allocate(16, None).unwrap();
        write(&memory, &memory::ram(16), "quiet init=/sbin/init").unwrap();
        // The offsets are those of boot.rst: cmd_line_ptr 0x228, boot_flag
        // 0x1fe.
        let pointer: u32 = memory.read_obj(GuestAddress(BOOT_PARAMS.0 + 0x228)).unwrap();
        let mut line = [0u8; 22];
        memory.read_slice(&mut line, GuestAddress(u64::from(pointer))).unwrap();
        assert_eq!(&line, b"quiet init=/sbin/init\0");
        let flag: u16 = memory.read_obj(GuestAddress(BOOT_PARAMS.0 + 0x1fe)).unwrap();
        assert_eq!(flag, BOOT_FLAG);
    }

    #[test]
    fn the_last_page_table_entry_maps_the_end_of_the_first_gib() {
        let memory = memory::allocate(16, None).unwrap();
        write(&memory, &memory::ram(16), "").unwrap();
        let last: u64 = memory.read_obj(GuestAddress(PD.0 + 511 * 8)).unwrap();
        assert_eq!(last & !0xfff, 0x3fe0_0000);
    }

    #[test]
    fn a_command_line_that_is_too_long_is_refused() {
        let memory = memory::allocate(16, None).unwrap();
        assert!(matches!(
            write(&memory, &memory::ram(16), &"x".repeat(2048)),
            Err(BootError::CmdlineTooLong(2048))
        ));
        write(&memory, &memory::ram(16), &"x".repeat(2047)).unwrap();
    }
}
