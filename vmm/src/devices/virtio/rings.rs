//! Operations on virtqueues that `virtio_queue` leaves to its users.
//!
//! - Taking a chain and asking for notifications go together; otherwise a chain
//!   that comes in between is overlooked.
//! - A packet that takes several chains must appear at once (virtio 1.2
//!   §5.1.6.4.1), but the crate shows the driver each used chain by itself.
//! - Whether the driver wants an interrupt is decided once for all chains that
//!   were used since the last time, with either way of suppression.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The next chain that the driver has made available. If there is none, the
/// driver will notify the device of the next one.
///
/// # Errors
/// The ring is broken: the driver claims more chains than it can have.
pub fn next_chain<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, Error> {
    if let Some(chain) = queue.iter(memory)?.next() {
        return Ok(Some(chain));
    }
    if queue.enable_notification(memory)? {
        return Ok(queue.iter(memory)?.next());
    }
    Ok(None)
}

/// Puts chains, given as head and written length, into the used ring such that
/// the driver sees all of them or none.
///
/// # Errors
/// The ring cannot be written, or a head is not one of the queue's.
pub fn add_used_together(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    chains: &[(u16, u32)],
) -> Result<(), Error> {
    let Some((&(last_head, last_len), others)) = chains.split_last() else { return Ok(()) };
    let mut next = queue.next_used();
    for &(head, len) in others {
        if head >= queue.size() {
            return Err(Error::InvalidDescriptorIndex);
        }
        let slot = u64::from(next.checked_rem(queue.size()).unwrap_or_default());
        let address = queue.used_ring().checked_add(4 + slot * 8).ok_or(Error::AddressOverflow)?;
        // `struct virtq_used_elem` is the head, followed by the length.
        let element = u64::from(head) | u64::from(len) << 32;
        memory.write_obj(element.to_le(), GuestAddress(address)).map_err(Error::GuestMemory)?;
        next = next.wrapping_add(1);
    }
    // The last element moves the index past all of them.
    queue.set_next_used(next);
    queue.add_used(memory, last_head, last_len)
}

/// Whether the driver wants an interrupt for the chains that were used since
/// the used index was `since` (virtio 1.2 §2.7.7).
#[must_use]
pub fn needs_interrupt(queue: &Queue, memory: &GuestMemoryMmap, since: u16) -> bool {
    let now = queue.next_used();
    if now == since {
        return false;
    }
    // The driver sets its event index, and then reads the ring again; the fence
    // orders our accesses accordingly.
    fence(Ordering::SeqCst);
    let read = |offset: u64| {
        let address = GuestAddress(queue.avail_ring().checked_add(offset)?);
        memory.load::<u16>(address, Ordering::Relaxed).ok().map(u16::from_le)
    };
    if queue.event_idx_enabled() {
        read(4 + u64::from(queue.size()) * 2).is_none_or(|event| has_passed(event, since, now))
    } else {
        read(0).is_none_or(|flags| u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

/// Whether an index that has moved from `since` to `now` was at `event` before it moved on (`vring_need_event` of
/// Linux's `virtio_ring.h`).
const fn has_passed(event: u16, since: u16, now: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(since)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::test_utils::{DriverQueue, Part, memory};

    #[test]
    fn an_empty_ring_asks_for_a_notification() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0, 4);
        let mut queue = driver.queue();
        queue.set_event_idx(true);
        for round in 0..3 {
            driver.add(&[Part::writable(0x10_0000, 8)]);
            let chain = next_chain(&mut queue, &memory).unwrap().unwrap();
            queue.add_used(&memory, chain.head_index(), 0).unwrap();
            assert_eq!(driver.avail_event(), round);
            assert!(next_chain(&mut queue, &memory).unwrap().is_none());
            assert_eq!(driver.avail_event(), round + 1);
            driver.used().unwrap();
        }
        driver.set_available_index(100);
        assert!(next_chain(&mut queue, &memory).is_err());
    }

    #[test]
    fn chains_appear_together_and_in_order() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0, 4);
        let mut queue = driver.queue();
        for round in 0..5 {
            let heads: Vec<u16> = (0..3).map(|_| driver.add(&[Part::writable(0x10_0000, 8)])).collect();
            let used: Vec<(u16, u32)> = heads.iter().map(|&head| (head, round * 8)).collect();
            add_used_together(&mut queue, &memory, &used).unwrap();
            let seen: Vec<(u16, u32)> = std::iter::from_fn(|| driver.used()).collect();
            assert_eq!(seen, used);
        }
        assert!(add_used_together(&mut queue, &memory, &[(4, 0)]).is_err());
    }

    #[test]
    fn the_driver_chooses_its_interrupts() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0, 16);
        let mut queue = driver.queue();
        assert!(!needs_interrupt(&queue, &memory, 0));
        queue.set_next_used(3);
        assert!(needs_interrupt(&queue, &memory, 0));
        driver.set_available_flags(1);
        assert!(!needs_interrupt(&queue, &memory, 0));

        queue.set_event_idx(true);
        // The event index means "when you use the chain with this index".
        for (event, since, wanted) in
            [(2, 0, true), (0, 0, true), (3, 0, false), (1, 2, false), (9, 0, false)]
        {
            driver.set_used_event(event);
            assert_eq!(needs_interrupt(&queue, &memory, since), wanted, "{event} since {since}");
        }
        queue.set_next_used(1);
        driver.set_used_event(u16::MAX);
        assert!(needs_interrupt(&queue, &memory, u16::MAX - 1));
    }

    /// A bounded proof: for every event, and every number of chains that a queue of 256 can have returned at once.
    #[test]
    fn an_interrupt_is_due_for_exactly_the_chains_that_were_returned() {
        for since in [0, 1, 0x7fff, 0x8000, 0xfffe, u16::MAX] {
            for count in 0..=256 {
                for distance in 0..=u16::MAX {
                    let due = has_passed(since.wrapping_add(distance), since, since.wrapping_add(count));
                    assert_eq!(due, distance < count, "{distance} behind {since}, {count} returned");
                }
            }
        }
    }

    /// A bounded proof: for every index, every size up to 16, and every number of chains up to the size.
    #[test]
    fn every_index_has_its_slot() {
        let memory = memory();
        for size in [1, 2, 4, 8, 16] {
            let driver = DriverQueue::new(&memory, 0, size);
            let mut queue = driver.queue();
            for next in 0..=u16::MAX {
                let count = next % size + 1;
                let used: Vec<(u16, u32)> = (0..count).map(|head| (head, u32::from(next) << 8)).collect();
                queue.set_next_used(next);
                add_used_together(&mut queue, &memory, &used).unwrap();
                assert_eq!(queue.next_used(), next.wrapping_add(count));
                for (place, &(head, len)) in (0..).zip(&used) {
                    let slot = queue.used_ring() + 4 + u64::from(next.wrapping_add(place) % size) * 8;
                    let element: u64 = memory.read_obj(GuestAddress(slot)).unwrap();
                    assert_eq!(element, u64::from(head) | u64::from(len) << 32, "index {next} of {size}");
                }
            }
        }
    }
}
