//! From the guest to the tap.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::tap::{HEADER_LEN, MAX_PACKET, Tap};
use crate::devices::virtio::buffers::Buffers;

/// An Ethernet header.
const MIN_FRAME: usize = 14;

/// Sends the packets that the guest has made available, `left` at most. What
/// the tap refuses is lost, as on any wire.
pub fn transmit(tap: &Tap, memory: &GuestMemoryMmap, queue: &mut Queue, left: &mut usize) {
    while *left > 0 {
        let Some(chain) = queue.pop_descriptor_chain(memory) else {
            // The second condition is false for a ring index from nowhere.
            if queue.enable_notification(memory).unwrap_or(false) && queue.iter(memory).is_ok() {
                continue;
            }
            return;
        };
        *left -= 1;
        let head = chain.head_index();
        if let Ok(buffers) = Buffers::readable(memory, chain)
            && (HEADER_LEN + MIN_FRAME..=MAX_PACKET).contains(&buffers.len())
        {
            // The interface is down, the header makes no sense, or the kernel
            // is out of memory.
            let _ = tap.write(&buffers.io_vecs(0, buffers.len()));
        }
        if queue.add_used(memory, head, 0).is_err() {
            return;
        }
    }
}
