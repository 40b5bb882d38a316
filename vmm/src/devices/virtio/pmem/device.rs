//! The persistent memory device: its configuration, and answers to flushes.

use std::io;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::config;
use crate::devices::virtio::device::{ActivateError, Activation, VirtioDevice};
use crate::devices::virtio::interrupt::USED_RING;
use crate::devices::virtio::rings::{needs_interrupt, next_chain};
use crate::devices::virtio::watch::QueueWatch;
use crate::memory::Range;

const QUEUE_SIZES: [u16; 1] = [64];

/// The only request (virtio 1.2 §5.19.6).
const FLUSH: [u8; 4] = 0u32.to_le_bytes();
/// The answers to a request (§5.19.7).
pub(super) const DONE: [u8; 4] = 0i32.to_le_bytes();
pub(super) const FAILED: [u8; 4] = (-1i32).to_le_bytes();

/// Most requests before other devices get their turn.
const BATCH: usize = 64;

/// The persistent memory device.
pub struct Pmem {
    pub(super) watch: QueueWatch,
    pub(super) range: Range,
    activation: Option<Activation>,
}

impl Pmem {
    /// Makes the device for a range of guest memory.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn new(range: Range) -> io::Result<Self> {
        Ok(Self { watch: QueueWatch::new()?, range, activation: None })
    }

    /// Answers requests, at most a batch.
    pub(super) fn serve(&mut self) {
        let Some(Activation { memory, queues, interrupt, .. }) = &mut self.activation else { return };
        let [queue] = queues.as_mut_slice() else { return };
        let before = queue.next_used();
        if !answer(memory, queue) {
            self.watch.wake();
        }
        if needs_interrupt(queue, memory, before) {
            interrupt.trigger(USED_RING);
        }
    }
}

/// Answers requests. True if none is left.
fn answer(memory: &GuestMemoryMmap, queue: &mut Queue) -> bool {
    for _ in 0..BATCH {
        let Ok(Some(chain)) = next_chain(queue, memory) else { return true };
        let head = chain.head_index();
        let written = flush(memory, chain);
        if queue.add_used(memory, head, u32::try_from(written).unwrap_or_default()).is_err() {
            return true;
        }
    }
    false
}

/// Writes the answer to one request; returns its length.
fn flush(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> usize {
    let mut request = FAILED;
    let read = Buffers::readable(memory, chain.clone()).map_or(0, |buffers| buffers.read(0, &mut request));
    let answer = if read == request.len() && request == FLUSH { DONE } else { FAILED };
    Buffers::writable(memory, chain).map_or(0, |buffers| buffers.write(0, &answer))
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = u128::from(self.range.start.0) | u128::from(self.range.size) << 64;
        config::read(&space.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        activation.begin("pmem", QUEUE_SIZES.len(), &mut self.watch)?;
        self.activation = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.activation = None;
        self.watch.reset();
    }

    fn activation(&self) -> Option<&Activation> {
        self.activation.as_ref()
    }
}
