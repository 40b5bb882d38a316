//! Guest memory: anonymous, private, and touched only when the guest does.

use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::x86_64::layout::{GAP_END, GAP_START};

/// Size of a page of the host.
pub const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Pages per `mincore` call.
const CHUNK: usize = 4096;

/// Guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Less than a kernel needs.
    #[error("{0} MiB of guest memory are not enough, at least 16 are needed")]
    TooSmall(u32),
    /// The host has not got that much address space.
    #[error("map {0} MiB of guest memory: {1}")]
    Map(u32, FromRangesError),
}

/// The address ranges of `size` bytes of memory, with the hole for devices
/// left out.
#[must_use]
pub fn ranges(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(GAP_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(GAP_END), (size - low) as usize));
    }
    ranges
}

/// Maps `mib` MiB. No page is touched, so none is used yet.
///
/// # Errors
/// [`MemoryError`].
pub fn allocate(mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    if mib < 16 {
        return Err(MemoryError::TooSmall(mib));
    }
    GuestMemoryMmap::from_ranges(&ranges(u64::from(mib) * MIB)).map_err(|error| MemoryError::Map(mib, error))
}

/// Bytes of guest memory that are in the host's memory now. Pages of the
/// kernel's file count when the host's page cache has them.
#[must_use]
pub fn resident_bytes(memory: &GuestMemoryMmap) -> u64 {
    let mut pages = 0u64;
    let mut map = vec![0u8; CHUNK];
    for region in memory.iter() {
        let length = region.len() as usize;
        for offset in (0..length).step_by(CHUNK * PAGE as usize) {
            let part = (length - offset).min(CHUNK * PAGE as usize);
            let start = region.as_ptr().wrapping_add(offset);
            // SAFETY: the range lies within a mapping that `memory` owns, and
            // `map` has one byte for each of its pages.
            let result = unsafe { libc::mincore(start.cast(), part, map.as_mut_ptr()) };
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
    #![allow(clippy::unwrap_used)]

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_beyond_three_gib_is_above_the_hole() {
        assert_eq!(ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(ranges((3 << 30) + 4096), [(GuestAddress(0), 3 << 30), (GuestAddress(1 << 32), 4096)]);
    }

    #[test]
    fn only_touched_memory_is_resident() {
        let memory = allocate(64).unwrap();
        let before = resident_bytes(&memory);
        for page in 0..10 {
            memory.write_obj(1u8, GuestAddress(page * (2 << 20))).unwrap();
        }
        let after = resident_bytes(&memory);
        assert!(after - before >= 10 * PAGE, "{before} then {after}");
    }

    #[test]
    fn a_machine_without_memory_is_refused() {
        assert!(matches!(allocate(15), Err(MemoryError::TooSmall(15))));
    }
}
