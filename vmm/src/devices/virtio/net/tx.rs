//! From the guest to the tap.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::tap::{HEADER_LEN, MAX_PACKET, Tap};
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::rings::next_chain;

/// An Ethernet header.
const MIN_FRAME: usize = 14;

/// Sends the packets that the guest has made available, `left` at most. What
/// the tap refuses is lost, as on any wire.
pub fn transmit(tap: &Tap, memory: &GuestMemoryMmap, queue: &mut Queue, left: &mut usize) {
    while *left > 0 {
        let Ok(Some(chain)) = next_chain(queue, memory) else { return };
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
