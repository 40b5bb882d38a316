//! The block device: its configuration, its disk, and the queue from which the
//! pool's threads take requests.

use std::io;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use nix::sys::timerfd::TimerFd;
use virtio_bindings::virtio_blk as vb;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::disk::{Disk, MAX_RANGE_SECTORS, MAX_RANGES, Outcome};
use super::pool::{IoPool, Watch};
use super::request::{Operation, Request, total};
use super::{SECTOR, SERIAL_LENGTH};
use crate::devices::virtio::device::{ActivateError, Activation, VirtioDevice};
use crate::devices::virtio::interrupt::{CONFIG_CHANGE, Interrupt, USED_RING};
use crate::devices::virtio::rate::{Limiter, Throttle};
use crate::lock;

/// Entries of the queue. Linux preallocates requests for all of them, for each
/// device.
pub(super) const QUEUE_SIZE: u16 = 64;
/// Most data buffers of one request: the queue's entries without header and
/// status, which bounds even an indirect chain (virtio 1.2 §2.7.5.3.1).
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// How long a reset waits for the requests that are in progress.
const RESET_WAIT: Duration = Duration::from_secs(10);

/// Bytes of the configuration up to `write_zeroes_may_unmap` (§5.2.4).
const CONFIG_LENGTH: usize = 60;

/// A disk cannot be attached to a slot, or detached from it.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The serial number is too long or not ASCII.
    #[error("serial number {0:?} is not 1 to {SERIAL_LENGTH} bytes of printable ASCII")]
    Serial(String),
    /// The device is not a slot.
    #[error("disk {0:?} is not a slot")]
    NotASlot(String),
    /// The slot has a disk.
    #[error("slot {0:?} has a disk already, detach it first")]
    Occupied(String),
    /// The slot has no disk.
    #[error("slot {0:?} is empty")]
    Empty(String),
    /// The guest still reads or writes.
    #[error("the guest still uses the disk in slot {0:?}, unmount it first")]
    Busy(String),
}

/// Whether the device's disk can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Kind {
    /// The device has this disk from the start.
    Fixed {
        /// Whether the device is offered with `VIRTIO_BLK_F_RO`.
        read_only: bool,
    },
    /// Disks are attached and detached. The device is offered as writable,
    /// because a driver reads that only once; writes to a read-only disk fail.
    Slot,
}

/// A virtio block device.
pub struct Block {
    serial: [u8; SERIAL_LENGTH],
    kind: Kind,
    disk: Option<Arc<Disk>>,
    pool: IoPool,
    me: Weak<Mutex<Self>>,
    activation: Option<(Activation, Watch)>,
    /// Counts activations. Requests of an earlier activation are not completed
    /// in a later one.
    epoch: u64,
    flight: Arc<Flight>,
    /// The number of requests that were taken off the queue and not returned.
    open: usize,
    /// Set when no more requests are taken, because the machine is about to be
    /// saved.
    resting: bool,
    limit: Option<Throttle>,
    /// How often the disk is flushed.
    flush_limit: Option<Throttle>,
}

impl Block {
    /// Makes a device with a disk.
    ///
    /// # Errors
    /// [`BlockError::Serial`].
    pub fn with_disk(serial: &str, disk: Disk, pool: IoPool) -> Result<Arc<Mutex<Self>>, BlockError> {
        let kind = Kind::Fixed { read_only: disk.read_only() };
        Ok(Self::build(parse_serial(serial)?, kind, Some(disk), pool))
    }

    /// Makes a slot: a device without a disk. It costs one or two eventfds
    /// until it gets one.
    ///
    /// # Errors
    /// [`BlockError::Serial`].
    pub fn slot(serial: &str, pool: IoPool) -> Result<Arc<Mutex<Self>>, BlockError> {
        Ok(Self::build(parse_serial(serial)?, Kind::Slot, None, pool))
    }

    pub(super) fn build(
        serial: [u8; SERIAL_LENGTH],
        kind: Kind,
        disk: Option<Disk>,
        pool: IoPool,
    ) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|me| {
            Mutex::new(Self {
                serial,
                kind,
                disk: disk.map(Arc::new),
                pool,
                me: me.clone(),
                activation: None,
                epoch: 0,
                flight: Arc::default(),
                open: 0,
                resting: false,
                limit: None,
                flush_limit: None,
            })
        })
    }

    /// Sets the rate limits of all requests and of those that flush the disk, before a driver
    /// has activated the device.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn limit(&mut self, requests: Option<Limiter>, flushes: Option<Limiter>) -> io::Result<()> {
        (self.limit, self.flush_limit) = (Throttle::new(requests)?, Throttle::new(flushes)?);
        Ok(())
    }

    /// The limits of all requests, and of those that flush the disk.
    pub(super) fn limiters(&self) -> [Option<&Limiter>; 2] {
        [&self.limit, &self.flush_limit].map(|limit| limit.as_ref().map(Throttle::limiter))
    }

    fn timers(&self) -> Vec<&TimerFd> {
        [&self.limit, &self.flush_limit].into_iter().flatten().map(Throttle::timer).collect()
    }

    /// Attaches a disk to a slot.
    ///
    /// # Errors
    /// [`BlockError::NotASlot`], [`BlockError::Occupied`].
    pub fn attach(&mut self, disk: Disk) -> Result<(), BlockError> {
        self.check_slot()?;
        if self.disk.is_some() {
            return Err(BlockError::Occupied(self.serial()));
        }
        self.disk = Some(Arc::new(disk));
        self.config_changed();
        Ok(())
    }

    /// Detaches the disk of a slot, and closes its file.
    ///
    /// # Errors
    /// [`BlockError::NotASlot`], [`BlockError::Empty`], [`BlockError::Busy`].
    pub fn detach(&mut self) -> Result<(), BlockError> {
        self.check_slot()?;
        if self.disk.is_none() {
            return Err(BlockError::Empty(self.serial()));
        }
        if !self.flight.is_idle() {
            return Err(BlockError::Busy(self.serial()));
        }
        self.disk = None;
        self.config_changed();
        Ok(())
    }

    fn check_slot(&self) -> Result<(), BlockError> {
        match self.kind {
            Kind::Slot => Ok(()),
            Kind::Fixed { .. } => Err(BlockError::NotASlot(self.serial())),
        }
    }

    fn config_changed(&self) {
        if let Some((activation, _)) = &self.activation {
            activation.interrupt.trigger(CONFIG_CHANGE);
        }
    }

    /// The serial number without its padding.
    #[must_use]
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&self.serial).trim_end_matches('\0').to_owned()
    }

    /// Whether the disk was read-only from the start.
    #[must_use]
    pub const fn read_only(&self) -> bool {
        matches!(self.kind, Kind::Fixed { read_only: true })
    }

    pub(super) const fn serial_bytes(&self) -> &[u8; SERIAL_LENGTH] {
        &self.serial
    }

    pub(super) const fn kind(&self) -> Kind {
        self.kind
    }

    pub(super) fn disk(&self) -> Option<&Disk> {
        self.disk.as_deref()
    }

    /// Stops taking requests, for good. True when all requests that were taken
    /// are answered, so that the device can be saved.
    pub const fn rest(&mut self) -> bool {
        self.resting = true;
        self.open == 0
    }

    /// Takes the next request off the queue. Malformed chains are returned on
    /// the way.
    pub(super) fn next_job(&mut self) -> Option<Job> {
        if self.resting {
            return None;
        }
        // The pool listens to the timer as it does to the queue.
        if self.limit.as_mut().is_some_and(Throttle::is_closed) {
            return None;
        }
        let (activation, _) = self.activation.as_mut()?;
        let queue = activation.queues.first_mut()?;
        // Stop after as many malformed chains as the queue has entries: a guest
        // that makes them as fast as they are returned has to notify again.
        for _ in 0..QUEUE_SIZE {
            let chain = queue.pop_descriptor_chain(&activation.memory)?;
            let head = chain.head_index();
            let request = Request::parse(chain);
            let flushes = request.as_ref().is_ok_and(|request| request.operation == Operation::Flush);
            if flushes && let Some(limit) = &mut self.flush_limit {
                if limit.is_closed() {
                    // The ring keeps it, and what is behind it.
                    queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                    return None;
                }
                limit.take(0);
            }
            // Notifications stay on while a thread waits for the file, so that
            // another thread can begin with requests that come in the meantime.
            let more = queue.enable_notification(&activation.memory).unwrap_or(false);
            if let Ok(request) = request {
                if more
                    && self.pool.has_idle()
                    && let Some(notification) = activation.queue_events.first()
                {
                    let _ = notification.write(1);
                }
                self.open += 1;
                if let Some(limit) = &mut self.limit {
                    limit.take(total(&request.input) + total(&request.output));
                }
                return Some(Job {
                    request,
                    disk: self.disk.clone(),
                    serial: self.serial,
                    memory: activation.memory.clone(),
                    epoch: self.epoch,
                    _flight: Flight::begin(&self.flight),
                });
            }
            return_chain(queue, &activation.memory, &activation.interrupt, head, 0);
        }
        None
    }

    /// Returns the chain of a request to the driver.
    pub(super) fn complete(&mut self, done: &Done) {
        self.open = self.open.saturating_sub(1);
        if done.epoch != self.epoch {
            return;
        }
        let Some((activation, _)) = self.activation.as_mut() else { return };
        // The address of the status byte was checked when the request was
        // parsed.
        let _ = activation.memory.write_obj(done.outcome.status, done.request.status);
        let Some(queue) = activation.queues.first_mut() else { return };
        let written = done.outcome.written.saturating_add(1);
        return_chain(queue, &activation.memory, &activation.interrupt, done.request.head, written);
    }

    fn config(&self) -> [u8; CONFIG_LENGTH] {
        let mut config = [0; CONFIG_LENGTH];
        let mut put = |offset: usize, bytes: &[u8]| {
            if let Some(place) = config.get_mut(offset..offset + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(0, &self.disk.as_ref().map_or(0, |disk| disk.sectors()).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        for (sectors, ranges) in [(36, 40), (48, 52)] {
            put(sectors, &MAX_RANGE_SECTORS.to_le_bytes());
            put(ranges, &MAX_RANGES.to_le_bytes());
        }
        put(44, &8u32.to_le_bytes()); // discards are best aligned to 4 KiB
        put(56, &[1]); // zeroed ranges may become holes
        config
    }
}

/// Puts a chain into the used ring. If the rings are broken, the driver cannot
/// be told, and this chain is lost.
fn return_chain(queue: &mut Queue, memory: &GuestMemoryMmap, interrupt: &Interrupt, head: u16, written: u32) {
    if queue.add_used(memory, head, written).is_ok() && queue.needs_notification(memory).unwrap_or(true) {
        interrupt.trigger(USED_RING);
    }
}

impl MutEventSubscriber for Block {
    // The pool's threads listen to the queue, not the event loop.
    fn process(&mut self, _: Events, _: &mut EventOps) {}

    fn init(&mut self, _: &mut EventOps) {}
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << vb::VIRTIO_BLK_F_SEG_MAX
            | 1 << vb::VIRTIO_BLK_F_BLK_SIZE;
        match self.kind {
            Kind::Fixed { read_only: true } => common | 1 << vb::VIRTIO_BLK_F_RO,
            _ => {
                common
                    | 1 << vb::VIRTIO_BLK_F_FLUSH
                    | 1 << vb::VIRTIO_BLK_F_DISCARD
                    | 1 << vb::VIRTIO_BLK_F_WRITE_ZEROES
            }
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        for (target, byte) in data.iter_mut().zip(rest) {
            *target = *byte;
        }
    }

    // The one writable field, the cache mode, is not offered.
    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |cause: String| ActivateError { device: "block", cause };
        let ready = activation.queues.first().is_some_and(QueueT::ready);
        let Some(notification) = activation.queue_events.first().filter(|_| ready) else {
            return Err(failed("the driver has not set up its virtqueue".into()));
        };
        self.epoch += 1;
        let watch = self
            .pool
            .watch(self.me.clone(), notification, &self.timers())
            .map_err(|error| failed(error.to_string()))?;
        self.activation = Some((activation, watch));
        Ok(())
    }

    fn reset(&mut self) {
        self.epoch += 1;
        if let Some((activation, watch)) = self.activation.take()
            && let Some(notification) = activation.queue_events.first()
        {
            self.pool.unwatch(&watch, notification, &self.timers());
        }
        // The driver may use the memory of its requests for other purposes as
        // soon as the reset is done (§2.1.2).
        self.flight.wait_idle(RESET_WAIT);
    }

    fn activation(&self) -> Option<&Activation> {
        self.activation.as_ref().map(|(activation, _)| activation)
    }
}

/// A serial number in the form that the guest reads, padded with zeroes.
fn parse_serial(serial: &str) -> Result<[u8; SERIAL_LENGTH], BlockError> {
    let mut padded = [0; SERIAL_LENGTH];
    let printable = !serial.is_empty() && serial.bytes().all(|byte| byte.is_ascii_graphic());
    match padded.get_mut(..serial.len()).filter(|_| printable) {
        Some(place) => place.copy_from_slice(serial.as_bytes()),
        None => return Err(BlockError::Serial(serial.to_owned())),
    }
    Ok(padded)
}

/// A request with all that its execution needs, so that the device's lock is
/// not held meanwhile.
pub(super) struct Job {
    request: Request,
    disk: Option<Arc<Disk>>,
    serial: [u8; SERIAL_LENGTH],
    memory: GuestMemoryMmap,
    epoch: u64,
    _flight: InFlight,
}

/// A request that was executed.
pub(super) struct Done {
    request: Request,
    outcome: Outcome,
    epoch: u64,
}

impl Job {
    pub(super) fn run(self, before_blocking: &dyn Fn()) -> Done {
        let failed = Outcome { status: vb::VIRTIO_BLK_S_IOERR as u8, written: 0 };
        let outcome = self
            .disk
            .map_or(failed, |disk| disk.execute(&self.request, &self.memory, &self.serial, before_blocking));
        Done { request: self.request, outcome, epoch: self.epoch }
    }
}

/// Counts the requests that are in progress.
#[derive(Default)]
struct Flight {
    count: Mutex<usize>,
    landed: Condvar,
}

impl Flight {
    fn begin(this: &Arc<Self>) -> InFlight {
        *lock(&this.count) += 1;
        InFlight(Arc::clone(this))
    }

    fn is_idle(&self) -> bool {
        *lock(&self.count) == 0
    }

    fn wait_idle(&self, limit: Duration) {
        let _ = self.landed.wait_timeout_while(lock(&self.count), limit, |count| *count > 0);
    }
}

struct InFlight(Arc<Flight>);

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut count = lock(&self.0.count);
        *count = count.saturating_sub(1);
        self.0.landed.notify_all();
    }
}
