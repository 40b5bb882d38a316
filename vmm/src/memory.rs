//! Guest memory. RAM is private anonymous memory; persistent memory is a file
//! of the host that is mapped privately. A page is used only when the guest
//! touches it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::mmap::FromRangesError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::arch::x86_64::layout::{GAP_END, GAP_START};

pub use crate::arch::x86_64::layout::Range;

/// Bytes of a page of the host.
pub const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Pages per `mincore` call.
const CHUNK: usize = 4096;
/// Bytes that are examined at once when memory is written to a file.
const WRITTEN_AT_ONCE: usize = 1 << 20;
/// The alignment, and the smallest piece, of persistent memory in Linux.
const PERSISTENT_ALIGNMENT: u64 = 2 * MIB;

/// Guest memory cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The requested size, in MiB, is less than a kernel needs.
    #[error("{0} MiB of guest memory are not enough, at least 16 are needed")]
    TooSmall(u32),
    /// The host cannot map that many MiB.
    #[error("map {0} MiB of guest memory: {1}")]
    Map(u32, FromRangesError),
    /// The file cannot serve as persistent memory.
    #[error("map the root file system: {0}")]
    Root(io::Error),
}

/// The ranges of RAM of a machine with `mib` MiB. They leave out the hole for
/// devices.
#[must_use]
pub fn ram(mib: u32) -> Vec<Range> {
    let size = u64::from(mib) * MIB;
    let low = size.min(GAP_START);
    let mut ranges = vec![Range { start: GuestAddress(0), size: low }];
    if size > low {
        ranges.push(Range { start: GuestAddress(GAP_END), size: size - low });
    }
    ranges
}

/// The range that `file` gets as persistent memory of a machine with `mib` MiB:
/// behind all RAM.
///
/// # Errors
/// The file cannot be looked at, or is empty.
pub fn persistent(mib: u32, file: &File) -> Result<Range, MemoryError> {
    let size = file.metadata().map_err(MemoryError::Root)?.len();
    if size == 0 {
        return Err(MemoryError::Root(io::Error::other("the file is empty")));
    }
    let end = ram(mib).last().map_or(0, Range::end);
    let start = end.max(GAP_END).next_multiple_of(1 << 30);
    Ok(Range { start: GuestAddress(start), size: size.next_multiple_of(PERSISTENT_ALIGNMENT) })
}

/// Maps `mib` MiB of RAM, and a file at its range of [`persistent`] memory. No
/// page is touched, so none is used yet.
///
/// The guest may write to the pages of the file, and then gets its own copy.
///
/// # Errors
/// [`MemoryError`].
pub fn allocate(mib: u32, root: Option<(&File, Range)>) -> Result<GuestMemoryMmap, MemoryError> {
    if mib < 16 {
        return Err(MemoryError::TooSmall(mib));
    }
    let ranges: Vec<_> = ram(mib)
        .into_iter()
        .chain(root.map(|(_, range)| range))
        .map(|range| (range.start, range.size as usize))
        .collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|error| MemoryError::Map(mib, error))?;
    if let Some((file, range)) = root {
        let size = file.metadata().map_err(MemoryError::Root)?.len();
        map_file(&memory, range.start, file, 0, size.min(range.size)).map_err(MemoryError::Root)?;
    }
    Ok(memory)
}

/// Replaces the pages at `start` by `size` bytes of a file, from `offset` on.
/// The mapping is private, so the guest's writes do not reach the file. Bytes
/// of the last page behind the file's end read as zeroes.
///
/// # Errors
/// The range is not in one piece of memory, or the file cannot be
/// mapped.
pub fn map_file(
    memory: &GuestMemoryMmap,
    start: GuestAddress,
    file: &File,
    offset: i64,
    size: u64,
) -> io::Result<()> {
    let slice = GuestMemoryBackend::get_slice(memory, start, size as usize).map_err(io::Error::other)?;
    // SAFETY: the range is page-aligned and lies within guest memory, which
    // this process owns and which nothing but raw and volatile accesses reach;
    // replacing its pages by private ones of the file keeps it valid.
    let mapped = unsafe {
        libc::mmap(
            slice.ptr_guard_mut().as_ptr().cast(),
            size as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Replaces the RAM by the pages of a file that [`write`] wrote.
///
/// # Errors
/// The file is not as large as the RAM, or cannot be mapped.
pub fn map_saved(memory: &GuestMemoryMmap, ram: &[Range], file: &File) -> io::Result<()> {
    let size: u64 = ram.iter().map(|range| range.size).sum();
    let found = file.metadata()?.len();
    if found != size {
        return Err(io::Error::other(format!("the saved memory has {found} bytes, the machine {size}")));
    }
    let mut offset = 0u64;
    for range in ram {
        map_file(memory, range.start, file, offset.cast_signed(), range.size)?;
        offset += range.size;
    }
    Ok(())
}

/// Writes the RAM to a new file, one range after the other, with holes for
/// pages of zeroes.
///
/// # Errors
/// The file's.
pub fn write(memory: &GuestMemoryMmap, ram: &[Range], file: &File) -> io::Result<()> {
    const ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];
    file.set_len(ram.iter().map(|range| range.size).sum())?;
    let mut chunk = vec![0; WRITTEN_AT_ONCE];
    let mut at = 0;
    for range in ram {
        let mut done = 0;
        while done < range.size {
            let length = (range.size - done).min(chunk.len() as u64) as usize;
            let part = chunk.get_mut(..length).unwrap_or_default();
            memory.read_slice(part, GuestAddress(range.start.0 + done)).map_err(io::Error::other)?;
            // Memory is a whole number of pages.
            let (pages, _) = part.as_chunks::<{ PAGE as usize }>();
            for run in pages.chunk_by(|one, other| (*one == ZEROES) == (*other == ZEROES)) {
                let bytes = run.as_flattened();
                if run.first().is_some_and(|page| *page != ZEROES) {
                    file.write_all_at(bytes, at)?;
                }
                at += bytes.len() as u64;
            }
            done += length as u64;
        }
    }
    Ok(())
}

/// Bytes of these ranges that are in the host's memory now. Pages of the
/// kernel's file count when they are in the host's page cache.
#[must_use]
pub fn resident_bytes(memory: &GuestMemoryMmap, ranges: &[Range]) -> u64 {
    let mut pages = 0u64;
    let mut map = vec![0u8; CHUNK];
    for range in ranges {
        for offset in (0..range.size).step_by(CHUNK * PAGE as usize) {
            let part = (range.size - offset).min(CHUNK as u64 * PAGE) as usize;
            let start = GuestAddress(range.start.0 + offset);
            let Ok(slice) = GuestMemoryBackend::get_slice(memory, start, part) else { continue };
            // SAFETY: the slice lies within a mapping that `memory` owns, and
            // `map` has one byte for each of its pages.
            let result = unsafe {
                libc::mincore(slice.ptr_guard().as_ptr().cast_mut().cast(), part, map.as_mut_ptr())
            };
            if result == 0 {
                let count = part.div_ceil(PAGE as usize);
                pages += map.iter().take(count).filter(|page| *page & 1 != 0).count() as u64;
            }
        }
    }
    pages * PAGE
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const fn range(start: u64, size: u64) -> Range {
        Range { start: GuestAddress(start), size }
    }

    #[test]
    fn memory_beyond_three_gib_is_above_the_hole() {
        assert_eq!(ram(3 << 10), [range(0, 3 << 30)]);
        assert_eq!(ram((3 << 10) + 1), [range(0, 3 << 30), range(1 << 32, MIB)]);
    }

    #[test]
    fn only_touched_memory_is_resident() {
        let memory = allocate(64, None).unwrap();
        let before = resident_bytes(&memory, &ram(64));
        for page in 0..10 {
            memory.write_obj(1u8, GuestAddress(page * (2 << 20))).unwrap();
        }
        let after = resident_bytes(&memory, &ram(64));
        assert!(after - before >= 10 * PAGE, "{before} then {after}");
    }

    #[test]
    fn a_machine_without_memory_is_refused() {
        assert!(matches!(allocate(15, None), Err(MemoryError::TooSmall(15))));
    }

    #[test]
    fn persistent_memory_is_the_file_and_what_is_written_to_it_stays_here() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        for (mib, start) in [(64, 4 << 30), (3072, 4 << 30), (4096, 5 << 30)] {
            assert_eq!(persistent(mib, &file).unwrap(), range(start, 2 * MIB));
        }
        let persistent_range = persistent(64, &file).unwrap();
        let memory = allocate(64, Some((&file, persistent_range))).unwrap();
        let last = GuestAddress(persistent_range.start.0 + 4999);
        assert_eq!(memory.read_obj::<u8>(last).unwrap(), 7);
        // Memory goes on behind the file's end, to the end of the range.
        for behind in [last.0 + 1, persistent_range.end() - 1] {
            assert_eq!(memory.read_obj::<u8>(GuestAddress(behind)).unwrap(), 0);
        }
        memory.write_obj(8u8, last).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 4999).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn saved_memory_comes_back_and_its_file_stays() {
        let machine = allocate(16, None).unwrap();
        for (address, value) in [(0u64, 1u8), (5 * PAGE + 7, 2), ((16 << 20) - 1, 3)] {
            machine.write_obj(value, GuestAddress(address)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        write(&machine, &ram(16), &file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 16 << 20);
        // Three pages, and what the file system itself needs.
        assert!(std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512 < 1 << 20);

        let clones: Vec<_> = (0..2).map(|_| allocate(16, None).unwrap()).collect();
        for clone in &clones {
            map_saved(clone, &ram(16), &file).unwrap();
            assert_eq!(clone.read_obj::<u8>(GuestAddress(5 * PAGE + 7)).unwrap(), 2);
            clone.write_obj(9u8, GuestAddress(0)).unwrap();
        }
        let mut saved = vec![0; 16 << 20];
        file.read_exact_at(&mut saved, 0).unwrap();
        let mut expected = vec![0; 16 << 20];
        machine.read_slice(&mut expected, GuestAddress(0)).unwrap();
        assert!(saved == expected, "a clone wrote into the template");
        assert!(map_saved(&allocate(17, None).unwrap(), &ram(17), &file).is_err());
    }

    #[test]
    fn an_empty_root_is_refused() {
        let empty = tempfile::tempfile().unwrap();
        assert!(matches!(persistent(64, &empty), Err(MemoryError::Root(_))));
    }
}
