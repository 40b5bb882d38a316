//! Loads `vmlinux`: walks the program headers of an ELF file, and maps each
//! segment's pages from the file to the guest addresses that the header names.
//!
//! Mapping avoids the copy, and lets all machines share the pages that their
//! kernels do not write. It works where file offset and address are congruent
//! modulo the page size. Segments that are not congruent, and the ends of a
//! segment that do not fill a page, are copied.
//!
//! A running machine still reads the file. To replace a kernel, rename a new
//! file over it; do not write into it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::arch::x86_64::layout::{HIGH_MEMORY, IDENTITY_MAPPED};
use crate::memory::{self, PAGE};

const HEADER_LENGTH: usize = 64;
const PROGRAM_HEADER_LENGTH: usize = 56;
/// Most program headers that are accepted. A vmlinux has about five.
const MAX_PROGRAM_HEADERS: u16 = 32;
const MAGIC_64_LE: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;

/// The kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file cannot be read.
    #[error("read the kernel: {0}")]
    Read(#[source] std::io::Error),
    /// The file is not an ELF file for x86-64.
    #[error("the kernel is not a 64-bit x86 ELF file (an uncompressed vmlinux is needed, not bzImage)")]
    NotElf,
    /// The file's headers contradict themselves.
    #[error("the kernel's ELF headers are damaged: {0}")]
    Damaged(&'static str),
    /// The kernel does not fit into memory.
    #[error("the kernel wants memory from {start:#x} to {end:#x}, which the machine has not got")]
    NoMemory {
        /// The first address of the segment.
        start: u64,
        /// The address after its last byte.
        end: u64,
    },
    /// A segment could not be mapped or copied.
    #[error("put a segment of the kernel into guest memory: {0}")]
    Place(String),
}

struct Segment {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// Puts the kernel into memory, and returns the address of its entry point. The
/// memory must be fresh: the parts of a segment that the file does not fill
/// must be zero.
///
/// # Errors
/// [`KernelError`].
pub fn load(file: &File, memory: &GuestMemoryMmap) -> Result<u64, KernelError> {
    let file_size = file.metadata().map_err(KernelError::Read)?.len();
    let mut header = [0u8; HEADER_LENGTH];
    file.read_exact_at(&mut header, 0).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => KernelError::NotElf,
        _ => KernelError::Read(error),
    })?;
    if !header.starts_with(&MAGIC_64_LE) || u16_at(&header, 18) != MACHINE_X86_64 {
        return Err(KernelError::NotElf);
    }
    let entry = u64_at(&header, 24);
    let segments = segments(file, &header)?;
    let contains =
        |segment: &Segment| (segment.address..segment.address + segment.memory_size).contains(&entry);
    if !segments.iter().any(contains) {
        return Err(KernelError::Damaged("the entry point lies outside of all segments"));
    }
    if entry >= IDENTITY_MAPPED {
        return Err(KernelError::Damaged("the entry point is not in the first GiB"));
    }
    for segment in &segments {
        if segment.offset.checked_add(segment.file_size).is_none_or(|end| end > file_size) {
            return Err(KernelError::Damaged("a segment lies outside of the file"));
        }
        let end = segment.address + segment.memory_size;
        let (start, length) = (GuestAddress(segment.address), segment.memory_size as usize);
        let fits = GuestMemoryBackend::check_range(memory, start, length);
        if segment.address < HIGH_MEMORY || !fits {
            return Err(KernelError::NoMemory { start: segment.address, end });
        }
        place(file, segment, memory)?;
    }
    Ok(entry)
}

fn segments(file: &File, header: &[u8; HEADER_LENGTH]) -> Result<Vec<Segment>, KernelError> {
    let (offset, size, count) = (u64_at(header, 32), u16_at(header, 54), u16_at(header, 56));
    if usize::from(size) != PROGRAM_HEADER_LENGTH || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(KernelError::Damaged("odd program headers"));
    }
    let mut table = vec![0u8; PROGRAM_HEADER_LENGTH * usize::from(count)];
    file.read_exact_at(&mut table, offset).map_err(KernelError::Read)?;
    let mut segments = Vec::new();
    for entry in table.chunks_exact(PROGRAM_HEADER_LENGTH) {
        let segment = Segment {
            offset: u64_at(entry, 8),
            address: u64_at(entry, 24),
            file_size: u64_at(entry, 32),
            memory_size: u64_at(entry, 40),
        };
        if u32_at(entry, 0) != PT_LOAD || segment.memory_size == 0 {
            continue;
        }
        if segment.file_size > segment.memory_size {
            return Err(KernelError::Damaged("a segment is larger in the file than in memory"));
        }
        if segment.address.checked_add(segment.memory_size).is_none() {
            return Err(KernelError::Damaged("a segment wraps around the address space"));
        }
        segments.push(segment);
    }
    Ok(segments)
}

/// Maps the whole pages of the segment, and copies the rest.
fn place(file: &File, segment: &Segment, memory: &GuestMemoryMmap) -> Result<(), KernelError> {
    let end = segment.address + segment.file_size;
    let first_page = segment.address.next_multiple_of(PAGE);
    let last_page = end - end % PAGE;
    let congruent = segment.address % PAGE == segment.offset % PAGE;
    if congruent && first_page < last_page {
        copy(file, segment, memory, segment.address, first_page)?;
        map(file, segment.offset + (first_page - segment.address), memory, first_page, last_page)?;
        copy(file, segment, memory, last_page, end)
    } else {
        copy(file, segment, memory, segment.address, end)
    }
}

fn copy(
    file: &File,
    segment: &Segment,
    memory: &GuestMemoryMmap,
    start: u64,
    end: u64,
) -> Result<(), KernelError> {
    let mut buffer = vec![0u8; (end - start).min(1 << 20) as usize];
    let mut at = start;
    while at < end {
        let length = (end - at).min(buffer.len() as u64) as usize;
        let part = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(part, segment.offset + (at - segment.address)).map_err(KernelError::Read)?;
        memory.write_slice(part, GuestAddress(at)).map_err(|error| KernelError::Place(error.to_string()))?;
        at += length as u64;
    }
    Ok(())
}

fn map(file: &File, offset: u64, memory: &GuestMemoryMmap, start: u64, end: u64) -> Result<(), KernelError> {
    let offset =
        i64::try_from(offset).map_err(|_| KernelError::Damaged("a segment lies outside of the file"))?;
    memory::map_file(memory, GuestAddress(start), file, offset, end - start)
        .map_err(|error| KernelError::Place(error.to_string()))
}

/// The little-endian field at `offset`. The callers' offsets are constants
/// within the length.
fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, offset))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::memory;

    const BASE: u64 = 0x100_0000;

    /// An ELF file with one segment, which holds the bytes 1, 2, 3 ... modulo
    /// 251.
    fn elf(offset: u64, address: u64, file_size: u64, memory_size: u64) -> (File, Vec<u8>) {
        let mut image = vec![0u8; (offset + file_size) as usize];
        image[..6].copy_from_slice(&MAGIC_64_LE);
        image[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
        image[24..32].copy_from_slice(&address.to_le_bytes());
        image[32..40].copy_from_slice(&64u64.to_le_bytes());
        image[54..56].copy_from_slice(&56u16.to_le_bytes());
        image[56..58].copy_from_slice(&1u16.to_le_bytes());
        image[64..68].copy_from_slice(&PT_LOAD.to_le_bytes());
        for (at, value) in [(72, offset), (88, address), (96, file_size), (104, memory_size)] {
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let content: Vec<u8> = (0..file_size).map(|i| (i % 251) as u8 + 1).collect();
        image[offset as usize..].copy_from_slice(&content);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&image).unwrap();
        (file, content)
    }

    fn check(offset: u64, address: u64, file_size: u64) {
        let memory = memory::allocate(64, None).unwrap();
        let (file, content) = elf(offset, address, file_size, file_size + 3 * PAGE);
        assert_eq!(load(&file, &memory).unwrap(), address);
        let mut got = vec![0u8; (file_size + 3 * PAGE) as usize];
        memory.read_slice(&mut got, GuestAddress(address)).unwrap();
        assert_eq!(got[..content.len()], content[..]);
        assert!(got[content.len()..].iter().all(|byte| *byte == 0), "the rest of the segment is zero");
        let before: u8 = memory.read_obj(GuestAddress(address - 1)).unwrap();
        assert_eq!(before, 0);
    }

    #[test]
    fn segments_arrive_whether_they_are_mapped_or_copied() {
        check(PAGE, BASE, 5 * PAGE); // maps exactly
        check(PAGE + 100, BASE + 100, 3 * PAGE); // maps, with both ends copied
        check(PAGE + 100, BASE, 3 * PAGE + 1); // not congruent
        check(PAGE + 100, BASE + 100, 50); // within one page
    }

    #[test]
    fn the_guest_does_not_write_into_the_file() {
        let memory = memory::allocate(64, None).unwrap();
        let (file, content) = elf(PAGE, BASE, 2 * PAGE, 2 * PAGE);
        load(&file, &memory).unwrap();
        memory.write_slice(&[0xff; 4096], GuestAddress(BASE)).unwrap();
        let mut again = vec![0u8; content.len()];
        file.read_exact_at(&mut again, PAGE).unwrap();
        assert_eq!(again, content);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let memory = memory::allocate(32, None).unwrap();
        let (file, _) = elf(PAGE, BASE, PAGE, 64 << 20);
        assert!(matches!(load(&file, &memory), Err(KernelError::NoMemory { .. })));
        let (file, _) = elf(PAGE, 0x1000, PAGE, PAGE);
        assert!(matches!(load(&file, &memory), Err(KernelError::NoMemory { .. })));
        let (file, _) = elf(PAGE, u64::MAX - 10, PAGE, PAGE);
        assert!(matches!(load(&file, &memory), Err(KernelError::Damaged(_))));
        let (file, _) = elf(PAGE, BASE, 2 * PAGE, 2 * PAGE);
        file.set_len(2 * PAGE).unwrap();
        assert!(matches!(load(&file, &memory), Err(KernelError::Damaged(_))));
    }

    #[test]
    fn other_files_are_refused() {
        let memory = memory::allocate(32, None).unwrap();
        let mut text = tempfile::tempfile().unwrap();
        assert!(matches!(load(&text, &memory), Err(KernelError::NotElf)));
        text.write_all(&[b'x'; 200]).unwrap();
        assert!(matches!(load(&text, &memory), Err(KernelError::NotElf)));
    }

    proptest! {
        #[test]
        fn damaged_headers_never_panic(position in 16usize..120, value: u64) {
            let memory = memory::allocate(32, None).unwrap();
            let (file, _) = elf(PAGE, BASE, PAGE, PAGE);
            file.write_all_at(&value.to_le_bytes(), position as u64).unwrap();
            let _ = load(&file, &memory);
        }
    }
}
