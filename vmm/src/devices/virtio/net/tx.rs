//! From the guest to the tap.

use std::time::Duration;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::tap::{HEADER_LEN, MAX_PACKET, Tap};
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::rate::Limiter;
use crate::devices::virtio::rings::next_chain;

/// An Ethernet header.
const MIN_FRAME: usize = 14;

/// Sends the packets that the guest has made available, `left` at most and no
/// more than `limiter` lets through: the time after which there may be more is
/// answered. What the tap refuses is lost, as on any wire.
pub fn transmit(
    tap: &Tap,
    memory: &GuestMemoryMmap,
    queue: &mut Queue,
    limiter: &mut Option<Limiter>,
    left: &mut usize,
) -> Option<Duration> {
    while *left > 0 {
        if let Some(wait) = limiter.as_mut().and_then(Limiter::wait) {
            return Some(wait);
        }
        let Ok(Some(chain)) = next_chain(queue, memory) else { return None };
        *left -= 1;
        let mut len = 0;
        let head = chain.head_index();
        if let Ok(buffers) = Buffers::readable(memory, chain)
            && (HEADER_LEN + MIN_FRAME..=MAX_PACKET).contains(&buffers.len())
        {
            // The interface is down, the header makes no sense, or the kernel
            // is out of memory.
            let _ = tap.write(&buffers.io_vecs(0, buffers.len()));
            len = buffers.len() - HEADER_LEN;
        }
        if let Some(limiter) = limiter {
            limiter.take(len as u64);
        }
        if queue.add_used(memory, head, 0).is_err() {
            return None;
        }
    }
    None
}
