//! The entropy device: fills the driver's buffers, within a budget.

use std::io;
use std::time::{Duration, Instant};

use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::device::{ActivateError, Activation, VirtioDevice};
use crate::devices::virtio::interrupt::USED_RING;
use crate::devices::virtio::rings::{needs_interrupt, next_chain};
use crate::devices::virtio::watch::QueueWatch;

const QUEUE_SIZES: [u16; 1] = [64];

/// Most bytes in answer to one request; a driver accepts fewer than it has
/// asked for (virtio 1.2 §5.4.6).
pub(super) const MAX_REQUEST: usize = 4 << 10;
/// Bytes that the guest gets in each [`PERIOD`].
pub(super) const BUDGET: usize = 64 << 10;
/// The least cost of a request in bytes, so that a guest cannot send empty ones
/// without end.
const MIN_COST: usize = 64;
/// The period of the [`BUDGET`].
pub(super) const PERIOD: Duration = Duration::from_millis(10);

/// The entropy device.
pub struct Rng {
    pub(super) watch: QueueWatch,
    pub(super) timer: TimerFd,
    budget: usize,
    period_start: Instant,
    activation: Option<Activation>,
}

impl Rng {
    /// Makes a device that is not activated.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            watch: QueueWatch::new()?,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            budget: BUDGET,
            period_start: Instant::now(),
            activation: None,
        })
    }

    /// Answers requests while the budget lasts. Returns false if it was used
    /// up, so that the device wants to be called in the next period.
    pub(super) fn serve(&mut self) -> bool {
        if self.period_start.elapsed() >= PERIOD {
            self.period_start = Instant::now();
            self.budget = BUDGET;
        }
        let Some(Activation { memory, queues, interrupt, .. }) = &mut self.activation else { return true };
        let [queue] = queues.as_mut_slice() else { return true };
        let before = queue.next_used();
        let done = answer(memory, queue, &mut self.budget);
        if needs_interrupt(queue, memory, before) {
            interrupt.trigger(USED_RING);
        }
        done
    }
}

/// Answers the requests of the queue. True if none is left.
fn answer(memory: &GuestMemoryMmap, queue: &mut Queue, budget: &mut usize) -> bool {
    while *budget > 0 {
        let Ok(Some(chain)) = next_chain(queue, memory) else { return true };
        let head = chain.head_index();
        let len = Buffers::writable(memory, chain).map_or(0, |buffers| fill(&buffers));
        *budget = budget.saturating_sub(len.max(MIN_COST));
        if queue.add_used(memory, head, u32::try_from(len).unwrap_or_default()).is_err() {
            return true;
        }
    }
    false
}

/// Writes random bytes; returns how many.
fn fill(buffers: &Buffers<'_>) -> usize {
    let mut bytes = [0; MAX_REQUEST];
    let wanted = buffers.len().min(MAX_REQUEST);
    // SAFETY: `bytes` has room for `wanted` bytes.
    let result = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), wanted, libc::GRND_NONBLOCK) };
    // The call fails only shortly after the host has booted.
    let len = usize::try_from(result).unwrap_or(0);
    buffers.write(0, bytes.get(..len).unwrap_or_default())
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        activation.begin("rng", QUEUE_SIZES.len(), &mut self.watch)?;
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
