//! Releases guest memory to the host.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::memory::PAGE;

/// Releases the whole pages between two guest addresses, as far as they are
/// guest memory.
///
/// Guest memory is mapped privately, so a released page is a fresh one at its
/// next use: of zeroes, or of the file behind it.
pub fn release(memory: &GuestMemoryMmap, start: u64, len: u64) {
    let Some(end) = start.checked_add(len) else { return };
    let Some(first) = start.checked_next_multiple_of(PAGE) else { return };
    let last = end - end % PAGE;
    let Some(len) = last.checked_sub(first).and_then(|len| usize::try_from(len).ok()) else { return };
    for slice in GuestMemoryBackend::get_slices(memory, GuestAddress(first), len) {
        let Ok(slice) = slice else { return };
        let pointer = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the range is guest memory. Nobody holds references to that,
        // and all who read it must expect that it changes.
        let result = unsafe { libc::madvise(pointer.cast(), slice.len(), libc::MADV_DONTNEED) };
        if result != 0 {
            // Locked and huge pages stay.
            return;
        }
    }
}

/// Returns the runs of successive page numbers: the first number and the count
/// of each.
///
/// A driver sends the numbers one by one, mostly in some order.
pub fn runs(numbers: &mut Vec<u32>) -> Vec<(u32, u32)> {
    numbers.sort_unstable();
    numbers.dedup();
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &number in &*numbers {
        match runs.last_mut() {
            Some((first, count)) if first.checked_add(*count) == Some(number) => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::devices::virtio::test_utils::{MEMORY_SIZE, memory};

    fn byte(memory: &GuestMemoryMmap, address: u64) -> u8 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn successive_pages_are_one_run() {
        assert_eq!(
            runs(&mut vec![9, 3, 2, 4, 9, u32::MAX, u32::MAX - 1]),
            [(2, 3), (9, 1), (u32::MAX - 1, 2)]
        );
        assert_eq!(runs(&mut Vec::new()), []);
    }

    #[test]
    fn only_whole_pages_inside_are_given_back() {
        let memory = memory();
        memory.write_slice(&[1; 0x5000], GuestAddress(0x10_0000)).unwrap();
        release(&memory, 0x10_0001, 0x3fff);
        assert_eq!(byte(&memory, 0x10_0fff), 1);
        assert_eq!(byte(&memory, 0x10_1000), 0);
        assert_eq!(byte(&memory, 0x10_3fff), 0);
        assert_eq!(byte(&memory, 0x10_4000), 1);
        release(&memory, 0x10_4001, 0xffe);
        assert_eq!(byte(&memory, 0x10_4000), 1);
    }

    #[test]
    fn a_range_may_cross_regions_and_the_end() {
        let memory = memory();
        let middle = MEMORY_SIZE as u64 / 2;
        let end = MEMORY_SIZE as u64;
        memory.write_slice(&[1; 0x2000], GuestAddress(middle - 0x1000)).unwrap();
        release(&memory, middle - 0x1000, 0x2000);
        assert_eq!((byte(&memory, middle - 1), byte(&memory, middle)), (0, 0));
        memory.write_slice(&[1; 0x1000], GuestAddress(end - 0x1000)).unwrap();
        release(&memory, end - 0x1000, u64::MAX - end);
        assert_eq!(byte(&memory, end - 1), 0);
        release(&memory, u64::MAX - 5, 5);
        release(&memory, u64::MAX, u64::MAX);
    }
}
