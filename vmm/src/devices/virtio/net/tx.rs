//! The way from the guest to the tap.

use std::time::Duration;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::tap::{HEADER_LEN, MAX_PACKET, Tap};
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::rate::Limiter;
use crate::devices::virtio::rings::next_chain;

/// Bytes of an Ethernet header.
const MIN_FRAME: usize = 14;

/// Sends the packets that the guest has made available: at most `left`, and no
/// more than `limiter` allows. Returns the time after which there may be more.
/// Packets that the tap refuses are lost, as on any wire.
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
            // An error means that the interface is down, the header is invalid,
            // or the kernel is out of memory.
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
