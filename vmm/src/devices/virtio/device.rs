//! The contract between a virtio device and its transport.

use std::sync::Arc;

use event_manager::MutEventSubscriber;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::watch::QueueWatch;

/// Memory, queues and interrupt of a device whose driver has set `DRIVER_OK`.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    /// The virtqueues as the driver set them up, checked to be valid. A queue
    /// that the driver does not use is not `ready()`.
    pub queues: Vec<Queue>,
    /// For each queue, the ioeventfd that the driver's notification writes to.
    pub queue_events: Vec<EventFd>,
    /// The interrupt to the driver.
    pub interrupt: Arc<Interrupt>,
    /// The features that the driver accepted.
    pub features: u64,
}

impl Activation {
    /// The first steps of an activation for devices on the event loop: checks
    /// that there are `queues`, uses event indices if the driver does, and
    /// makes the loop watch the queues.
    ///
    /// # Errors
    /// Names `device`.
    pub fn begin(
        &mut self,
        device: &'static str,
        queues: usize,
        watch: &mut QueueWatch,
    ) -> Result<(), ActivateError> {
        if self.queues.len() != queues {
            let cause = format!("there are {} queues instead of {queues}", self.queues.len());
            return Err(ActivateError { device, cause });
        }
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        self.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
        watch.activate(&self.queue_events).map_err(|error| ActivateError { device, cause: error.to_string() })
    }
}

/// A device could not be activated.
#[derive(Debug, thiserror::Error)]
#[error("activate {device}: {cause}")]
pub struct ActivateError {
    /// The kind of device: "block", "net".
    pub device: &'static str,
    /// The cause in words.
    pub cause: String,
}

/// A virtio device behind a transport.
///
/// The transport lives on the vCPU threads and keeps the registers of virtio
/// 1.2 §4.2.2; the device lives on the event loop. They share the device under
/// one mutex, so no method may block or wait for the guest.
///
/// The life of a device: the driver reads the features and the configuration,
/// then the transport calls [`activate`](Self::activate) once. The device keeps
/// the [`Activation`], and from then on must have the event loop watch its
/// queues. As `activate` runs on a vCPU thread, which has no access to the
/// event loop, it writes to an eventfd that was registered in
/// [`MutEventSubscriber::init`], and registers the queues when that fires.
/// [`reset`](Self::reset) returns the queues; the device is then as new.
///
/// Everything in guest memory is hostile. A device answers a malformed request
/// with its error status, or ignores the queue from then on; it never panics,
/// and never allocates as much as the guest asks for without a bound.
///
/// Each device also has a `State`: a plain serde struct with a version,
/// `save(&self) -> State` and `restore(State, resources) -> Self`, in its
/// `persist.rs`. The transport saves the queues and registers; the device saves
/// the rest.
pub trait VirtioDevice: MutEventSubscriber + Send {
    /// The device id (virtio 1.2 §5).
    fn device_type(&self) -> u32;

    /// The features offered, including `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// The largest size of each virtqueue.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. Writes to read-only bytes are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Activates the device: the driver is ready.
    ///
    /// # Errors
    /// The transport then sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Returns the device to its state before `activate`: the driver reset it.
    fn reset(&mut self);

    /// Memory, queues and interrupt while the device is active, for saving its queues.
    fn activation(&self) -> Option<&Activation>;
}
