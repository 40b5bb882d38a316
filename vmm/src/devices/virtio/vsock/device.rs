//! The vsock device: queues on one side, the [`Muxer`] on the other.

use std::io;
use std::os::unix::net::UnixListener;

use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use zerocopy::{FromZeros, IntoBytes};

use super::muxer::{HostPort, Muxer};
use super::packet::{HEADER_LEN, Header};
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::device::{ActivateError, Activation, VirtioDevice};
use crate::devices::virtio::interrupt::USED_RING;
use crate::devices::virtio::rate::{Limiter, Throttle};
use crate::devices::virtio::rings::{needs_interrupt, next_chain};
use crate::devices::virtio::watch::QueueWatch;

/// The index of the queue that carries packets to the guest.
pub const RX: usize = 0;
/// The index of the queue that carries packets from the guest.
pub const TX: usize = 1;
/// The index of the queue that carries events to the guest.
pub const EVENT: usize = 2;

const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Most packets in each direction before other devices get their turn.
const BATCH: usize = 64;

/// The event `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2 §5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// The vsock device.
pub struct Vsock {
    pub(super) muxer: Muxer,
    pub(super) watch: QueueWatch,
    pub(super) timer: TimerFd,
    pub(super) timer_is_set: bool,
    /// Whether the driver must still be told that all connections are gone.
    pub(super) owes_reset_event: bool,
    /// How much the guest may send.
    pub(super) limit: Option<Throttle>,
    activation: Option<Activation>,
}

impl Vsock {
    /// Makes a device for a guest with context id `cid`. Host clients connect
    /// to `listener`; the guest can connect to `host_port`.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn new(cid: u32, listener: UnixListener, host_port: Option<HostPort>) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            muxer: Muxer::new(cid, listener, host_port)?,
            watch: QueueWatch::new()?,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            timer_is_set: false,
            owes_reset_event: false,
            limit: None,
            activation: None,
        })
    }

    /// Limits what the guest sends, before the event loop knows the device.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn limit(&mut self, limiter: Option<Limiter>) -> io::Result<()> {
        self.limit = Throttle::new(limiter)?;
        Ok(())
    }

    /// Moves packets both ways, at most a batch.
    pub(super) fn serve(&mut self) {
        let Some(Activation { memory, queues, interrupt, .. }) = &mut self.activation else { return };
        let [rx, tx, event] = queues.as_mut_slice() else { return };
        let before = [rx.next_used(), tx.next_used(), event.next_used()];
        if self.owes_reset_event && send_event(memory, event, TRANSPORT_RESET) {
            self.owes_reset_event = false;
        }
        let mut left = BATCH;
        transmit(&mut self.muxer, memory, tx, &mut self.limit, &mut left);
        let stalled = !self.muxer.can_receive();
        let mut room = BATCH;
        receive(&mut self.muxer, memory, rx, &mut room);
        if [&*rx, tx, event]
            .into_iter()
            .zip(before)
            .any(|(queue, since)| needs_interrupt(queue, memory, since))
        {
            interrupt.trigger(USED_RING);
        }
        if left == 0 || room == 0 || (stalled && self.muxer.can_receive()) {
            self.watch.wake();
        }
    }

    /// The number of open connections.
    #[must_use]
    pub const fn connections(&self) -> usize {
        self.muxer.connections()
    }

    /// Whether a driver has activated the device.
    pub(super) const fn is_active(&self) -> bool {
        self.activation.is_some()
    }
}

/// Takes packets from the guest, `left` at most and no more than `limit` lets through.
fn transmit(
    muxer: &mut Muxer,
    memory: &GuestMemoryMmap,
    queue: &mut Queue,
    limit: &mut Option<Throttle>,
    left: &mut usize,
) {
    while *left > 0 && muxer.can_receive() {
        if limit.as_mut().is_some_and(Throttle::is_closed) {
            return;
        }
        let Ok(Some(chain)) = next_chain(queue, memory) else { return };
        *left -= 1;
        let head = chain.head_index();
        let mut len = 0;
        if let Ok(buffers) = Buffers::readable(memory, chain) {
            len = buffers.len().saturating_sub(HEADER_LEN);
            let mut header = Header::new_zeroed();
            if buffers.read(0, header.as_mut_bytes()) == HEADER_LEN {
                muxer.receive(&header, &buffers);
            }
        }
        if let Some(limit) = limit {
            limit.take(len as u64);
        }
        if queue.add_used(memory, head, 0).is_err() {
            break;
        }
    }
}

/// Gives packets to the guest, at most `left`.
fn receive(muxer: &mut Muxer, memory: &GuestMemoryMmap, queue: &mut Queue, left: &mut usize) {
    while *left > 0 && muxer.has_packets() {
        let Ok(Some(chain)) = next_chain(queue, memory) else { return };
        let head = chain.head_index();
        let len = match Buffers::writable(memory, chain) {
            Ok(buffers) if buffers.len() > HEADER_LEN => {
                let Some(header) = muxer.next_packet(&buffers) else {
                    queue.go_to_previous_position();
                    break;
                };
                buffers.write(0, header.as_bytes());
                // At most MAX_PAYLOAD.
                u32::try_from(HEADER_LEN).unwrap_or_default() + header.len.get()
            }
            // No packet fits into this chain.
            _ => 0,
        };
        *left -= 1;
        if queue.add_used(memory, head, len).is_err() {
            break;
        }
    }
}

/// Sends an event to the driver, if it has given a buffer for that.
fn send_event(memory: &GuestMemoryMmap, queue: &mut Queue, id: u32) -> bool {
    let Ok(Some(chain)) = next_chain(queue, memory) else { return false };
    let head = chain.head_index();
    let len = Buffers::writable(memory, chain).map_or(0, |buffers| buffers.write(0, &id.to_le_bytes()));
    queue.add_used(memory, head, u32::try_from(len).unwrap_or_default()).is_ok()
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        // A device without a feature bit for another socket type has streams
        // only.
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::devices::virtio::config::read(&self.muxer.guest_cid().to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        activation.begin("vsock", QUEUE_SIZES.len(), &mut self.watch)?;
        self.activation = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.activation = None;
        self.owes_reset_event = false;
        self.watch.reset();
    }

    fn activation(&self) -> Option<&Activation> {
        self.activation.as_ref()
    }
}
