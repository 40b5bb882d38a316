//! The balloon: its configuration, and the handling of its queues.

use std::io;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::pages::{release, runs};
use crate::devices::virtio::buffers::{Buffers, MAX_SEGMENTS};
use crate::devices::virtio::config;
use crate::devices::virtio::device::{ActivateError, Activation, VirtioDevice};
use crate::devices::virtio::interrupt::{CONFIG_CHANGE, USED_RING};
use crate::devices::virtio::rings::{needs_interrupt, next_chain};
use crate::devices::virtio::watch::QueueWatch;
use crate::memory::PAGE;

// Feature bits (virtio 1.2 §5.5.3).
const DEFLATE_ON_OOM: u32 = 2;
const PAGE_REPORTING: u32 = 5;

/// The queues for inflating, deflating, and reporting. Queues of features that
/// are not offered are not counted (virtio 1.2 §5.5.2), so reporting comes
/// third.
const QUEUE_SIZES: [u16; 3] = [128, 128, 128];

/// Balloon pages per MiB. They have 4 KiB on every architecture (§5.5.6).
const PAGES_PER_MIB: u32 = 256;

/// Most page numbers of one request that are read; Linux sends 256.
const MAX_NUMBERS: usize = 4096;
/// Most bytes of one report that are released; Linux sends 128 MiB.
const MAX_REPORT: u64 = 256 << 20;
/// Most requests of each queue before other devices get their turn: releasing
/// memory takes time.
const BATCH: usize = 8;

/// The bytes of `actual` in the configuration space.
const ACTUAL: std::ops::Range<u64> = 4..8;

/// The balloon.
pub struct Balloon {
    pub(super) watch: QueueWatch,
    /// The size that the host wants, in pages.
    pub(super) wanted: u32,
    /// The size that the driver reports, in pages.
    pub(super) actual: u32,
    activation: Option<Activation>,
}

impl Balloon {
    /// Makes an empty balloon.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn new() -> io::Result<Self> {
        Ok(Self { watch: QueueWatch::new()?, wanted: 0, actual: 0, activation: None })
    }

    /// Asks the guest to make the balloon this large, MiB. The guest gives as
    /// much as it can, see [`actual_mib`](Self::actual_mib).
    pub fn set_size_mib(&mut self, size: u32) {
        self.wanted = size.saturating_mul(PAGES_PER_MIB);
        if let Some(activation) = &self.activation {
            activation.interrupt.trigger(CONFIG_CHANGE);
        }
    }

    /// The size of the balloon that the guest reports, MiB.
    #[must_use]
    pub const fn actual_mib(&self) -> u32 {
        self.actual / PAGES_PER_MIB
    }

    /// Handles requests, at most a batch.
    pub(super) fn serve(&mut self) {
        let Some(Activation { memory, queues, interrupt, .. }) = &mut self.activation else { return };
        let [inflate, deflate, report] = queues.as_mut_slice() else { return };
        let mut finished = true;
        let mut serve = |queue: &mut Queue, handle: &dyn Fn(DescriptorChain<&GuestMemoryMmap>)| {
            let before = queue.next_used();
            finished &= answer(memory, queue, handle);
            if needs_interrupt(queue, memory, before) {
                interrupt.trigger(USED_RING);
            }
        };
        serve(inflate, &|chain| take_pages(memory, chain));
        // The guest may use its pages again without notice (§5.5.6.1).
        serve(deflate, &|_| {});
        serve(report, &|chain| take_report(memory, chain));
        if !finished {
            self.watch.wake();
        }
    }
}

/// Answers requests of one queue. True if none is left.
fn answer(
    memory: &GuestMemoryMmap,
    queue: &mut Queue,
    handle: &dyn Fn(DescriptorChain<&GuestMemoryMmap>),
) -> bool {
    for _ in 0..BATCH {
        let Ok(Some(chain)) = next_chain(queue, memory) else { return true };
        let head = chain.head_index();
        handle(chain);
        if queue.add_used(memory, head, 0).is_err() {
            return true;
        }
    }
    false
}

/// Releases the pages that a request names, as numbers of 32 bits each.
fn take_pages(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) {
    let Ok(buffers) = Buffers::readable(memory, chain) else { return };
    let mut numbers = Vec::new();
    let mut bytes = [0; 1024];
    let mut offset = 0;
    while numbers.len() < MAX_NUMBERS {
        let len = buffers.read(offset, &mut bytes);
        let (whole, _) = bytes.get(..len).unwrap_or_default().as_chunks();
        if whole.is_empty() {
            break;
        }
        numbers.extend(whole.iter().copied().map(u32::from_le_bytes));
        offset += len;
    }
    for (first, count) in runs(&mut numbers) {
        release(memory, u64::from(first) * PAGE, u64::from(count) * PAGE);
    }
}

/// Releases the memory that the descriptors of a report point to.
fn take_report(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) {
    let mut left = MAX_REPORT;
    for descriptor in chain.take(MAX_SEGMENTS).filter(|descriptor| descriptor.is_write_only()) {
        let len = u64::from(descriptor.len());
        let Some(rest) = left.checked_sub(len) else { return };
        left = rest;
        release(memory, descriptor.addr().0, len);
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, DEFLATE_ON_OOM, PAGE_REPORTING]
            .into_iter()
            .fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = u64::from(self.wanted) | u64::from(self.actual) << 32;
        config::read(&space.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut actual = self.actual.to_le_bytes();
        for (place, byte) in (offset..ACTUAL.end).zip(data) {
            let index = place.checked_sub(ACTUAL.start).and_then(|index| usize::try_from(index).ok());
            if let Some(to) = index.and_then(|index| actual.get_mut(index)) {
                *to = *byte;
            }
        }
        self.actual = u32::from_le_bytes(actual);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        activation.begin("balloon", QUEUE_SIZES.len(), &mut self.watch)?;
        self.activation = Some(activation);
        Ok(())
    }

    /// The size that the host wants stays; a new driver starts with an empty
    /// balloon.
    fn reset(&mut self) {
        self.activation = None;
        self.actual = 0;
        self.watch.reset();
    }

    fn activation(&self) -> Option<&Activation> {
        self.activation.as_ref()
    }
}
