//! The virtio-mmio transport (virtio 1.2 §4.2): a page of registers through
//! which a driver negotiates with its device and sets up the virtqueues.
//!
//! The registers are plain data ([`Registers`]); a save copies them, together
//! with each queue's position in its rings.

use std::sync::{Arc, Mutex};

use husk_vmm_api::{DeviceReport, QueueReport};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, VirtioDevice};
use super::interrupt::{CONFIG_CHANGE, Interrupt};
use crate::devices::bus::BusDevice;
use crate::lock;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// The layout of virtio 1.0 and later; 1 is the legacy one.
const LAYOUT: u32 = 2;
/// "HUSK", little-endian; drivers do not look at it.
const VENDOR: u32 = 0x4b53_5548;
/// Version of [`TransportState`].
const VERSION: u16 = 1;

/// The offset of the register that a driver's notification writes to.
pub const QUEUE_NOTIFY: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// The values that a driver has written, without the device's own
/// configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

/// One virtqueue, as its driver describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    max_size: u16,
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    /// The device's position in the available ring, zero until it is active.
    next_available: u16,
    /// The device's position in the used ring, zero until it is active.
    next_used: u16,
}

/// A saved transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    version: u16,
    device_type: u32,
    registers: Registers,
    interrupt_status: u32,
    config_generation: u32,
}

/// A saved transport cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum TransportRestoreError {
    /// The state was saved by another version.
    #[error("transport state of version {0} is not supported")]
    Version(u16),
    /// The state belongs to another kind of device, or to one with other queues.
    #[error("transport state is of another device")]
    OtherDevice,
    /// A virtqueue's state is invalid.
    #[error("restore virtqueues: {0}")]
    Queue(String),
    /// The device could not be activated.
    #[error(transparent)]
    Activate(#[from] super::device::ActivateError),
}

/// A virtio device on the bus.
pub struct MmioTransport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: GuestMemoryMmap,
    interrupt: Arc<Interrupt>,
    queue_events: Vec<EventFd>,
    registers: Registers,
}

impl MmioTransport {
    /// Makes a transport for `device` that interrupts through `line`.
    ///
    /// # Errors
    /// No eventfds can be made.
    pub fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: GuestMemoryMmap,
        line: EventFd,
    ) -> std::io::Result<Self> {
        let queues = Self::fresh_queues(&*lock(&device));
        let queue_events = queues
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            memory,
            interrupt: Arc::new(Interrupt::new(line)),
            queue_events,
            registers: Registers { queues, ..Registers::default() },
        })
    }

    fn fresh_queues(device: &dyn VirtioDevice) -> Vec<QueueRegisters> {
        let queue = |&max_size| QueueRegisters { max_size, size: max_size, ..QueueRegisters::default() };
        device.queue_sizes().iter().map(queue).collect()
    }

    /// The eventfd of each queue, to be registered with KVM for
    /// [`QUEUE_NOTIFY`] and the queue's index.
    #[must_use]
    pub fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    /// The interrupt to the driver.
    #[must_use]
    pub const fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    fn read_register(&self, offset: u64) -> u32 {
        let device = lock(&self.device);
        let queue = self.selected();
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => LAYOUT,
            reg::VIRTIO_MMIO_DEVICE_ID => device.device_type(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => {
                half(device.features(), self.registers.device_features_select)
            }
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size.into()),
            reg::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| queue.ready.into()),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            reg::VIRTIO_MMIO_STATUS => self.registers.status,
            // There are no shared memory regions: length and base are all ones
            // (§4.2.2).
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES if self.negotiating() => {
                let select = self.registers.driver_features_select;
                set_half(&mut self.registers.driver_features, select, value);
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => {
                // KVM handles these itself when the eventfd is registered with
                // it.
                if let Some(event) = self.queue_events.get(value as usize) {
                    let _ = event.write(1);
                }
            }
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            offset => self.write_queue(offset, value),
        }
    }

    /// Writes a register of the selected queue. They are writable after the
    /// features are agreed upon, until the driver is ready (§3.1.1); of a queue
    /// that is ready, only `QueueReady` is (§4.2.2.2).
    fn write_queue(&mut self, offset: u32, value: u32) {
        if self.registers.status & (FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET) != FEATURES_OK {
            return;
        }
        let Some(queue) = self.registers.queues.get_mut(self.registers.queue_select as usize) else {
            return;
        };
        if offset == reg::VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value & 1 != 0;
            return;
        }
        if queue.ready {
            return;
        }
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available, 0, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available, 1, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, 0, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, 1, value),
            _ => {}
        }
    }

    /// Writes the status register. A driver adds one bit after the other in the
    /// order of §3.1.1; a bit out of order is ignored.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let status = self.registers.status;
        if value & FAILED != 0 {
            self.registers.status |= FAILED;
            return;
        }
        // Only a reset clears bits.
        let next = value | status;
        match next & !status & !NEEDS_RESET {
            0 => {}
            added if added & !(ACKNOWLEDGE | DRIVER) == 0 => self.registers.status = next,
            FEATURES_OK if status & (ACKNOWLEDGE | DRIVER) == ACKNOWLEDGE | DRIVER => {
                let offered = lock(&self.device).features();
                let accepted = self.registers.driver_features;
                if accepted & !offered == 0 && accepted & 1 << VIRTIO_F_VERSION_1 != 0 {
                    self.registers.status = next;
                }
            }
            DRIVER_OK if status & (FEATURES_OK | NEEDS_RESET | FAILED) == FEATURES_OK => {
                if self.activate().is_ok() {
                    self.registers.status = next;
                } else {
                    self.registers.status |= NEEDS_RESET;
                    self.interrupt.trigger(CONFIG_CHANGE);
                }
            }
            _ => {}
        }
    }

    fn activate(&self) -> Result<(), TransportRestoreError> {
        let event_idx = self.registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.registers.queues.len());
        for registers in &self.registers.queues {
            let queue = Queue::try_from(QueueState {
                max_size: registers.max_size,
                next_avail: registers.next_available,
                next_used: registers.next_used,
                event_idx_enabled: event_idx,
                size: registers.size,
                ready: registers.ready,
                desc_table: registers.descriptors,
                avail_ring: registers.available,
                used_ring: registers.used,
            })
            .map_err(|error| TransportRestoreError::Queue(error.to_string()))?;
            if registers.ready && !queue.is_valid(&self.memory) {
                return Err(TransportRestoreError::Queue("its rings lie outside of memory".into()));
            }
            queues.push(queue);
        }
        let queue_events = self
            .queue_events
            .iter()
            .map(EventFd::try_clone)
            .collect::<Result<_, _>>()
            .map_err(|error| TransportRestoreError::Queue(error.to_string()))?;
        lock(&self.device).activate(Activation {
            memory: self.memory.clone(),
            queues,
            queue_events,
            interrupt: Arc::clone(&self.interrupt),
            features: self.registers.driver_features,
        })?;
        Ok(())
    }

    fn reset(&mut self) {
        let mut device = lock(&self.device);
        if device.activation().is_some() {
            device.reset();
        }
        self.registers = Registers { queues: Self::fresh_queues(&*device), ..Registers::default() };
        self.interrupt.restore(0, self.interrupt.generation());
        for event in &self.queue_events {
            // The counter may be zero already.
            let _ = event.read();
        }
    }

    /// Whether the driver may still say which features it accepts.
    const fn negotiating(&self) -> bool {
        self.registers.status & (DRIVER | FEATURES_OK) == DRIVER
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.registers.queues.get(self.registers.queue_select as usize)
    }

    /// Saves the registers, and the device's positions in its rings. The device
    /// must not be working on a request.
    #[must_use]
    pub fn save(&self) -> TransportState {
        let device = lock(&self.device);
        let mut registers = self.registers.clone();
        if let Some(activation) = device.activation() {
            for (saved, queue) in registers.queues.iter_mut().zip(&activation.queues) {
                saved.next_available = queue.next_avail();
                saved.next_used = queue.next_used();
            }
        }
        TransportState {
            version: VERSION,
            device_type: device.device_type(),
            registers,
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.generation(),
        }
    }

    /// Reports the device's present state, as far as its rings can be read.
    #[must_use]
    pub fn report(&self) -> DeviceReport {
        let device = lock(&self.device);
        let active = device.activation().map_or(&[][..], |activation| &activation.queues);
        let read = |address: u64| self.memory.read_obj::<u16>(GuestAddress(address)).unwrap_or_default();
        let queues = active.iter().map(|queue| QueueReport {
            available: read(queue.avail_ring().wrapping_add(2)),
            taken: queue.next_avail(),
            notify_after: read(queue.used_ring().wrapping_add(4 + 8 * u64::from(queue.size()))),
            used: queue.next_used(),
            interrupt_after: read(queue.avail_ring().wrapping_add(4 + 2 * u64::from(queue.size()))),
        });
        DeviceReport {
            kind: device.device_type(),
            status: self.registers.status,
            interrupt: self.interrupt.status(),
            queues: queues.collect(),
        }
    }

    /// Restores the saved state, and activates the device if it was active.
    /// Must be called on a new transport of a restored device.
    ///
    /// # Errors
    /// [`TransportRestoreError`].
    pub fn restore(&mut self, state: TransportState) -> Result<(), TransportRestoreError> {
        if state.version != VERSION {
            return Err(TransportRestoreError::Version(state.version));
        }
        let same_queues = state.registers.queues.iter().map(|queue| queue.max_size).eq(self
            .registers
            .queues
            .iter()
            .map(|q| q.max_size));
        if state.device_type != lock(&self.device).device_type() || !same_queues {
            return Err(TransportRestoreError::OtherDevice);
        }
        self.registers = state.registers;
        self.interrupt.restore(state.interrupt_status, state.config_generation);
        if self.registers.status & DRIVER_OK != 0 {
            self.activate()?;
            // A notification that came while the machine was saved is not in
            // the state: let the device look at its queues once.
            for event in &self.queue_events {
                let _ = event.write(1);
            }
        }
        Ok(())
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(reg::VIRTIO_MMIO_CONFIG.into()) {
            data.fill(0);
            lock(&self.device).read_config(offset, data);
        } else if let Ok(register) = <&mut [u8; 4]>::try_from(&mut *data) {
            *register = self.read_register(offset).to_le_bytes();
        } else {
            // Registers are read and written as 32 bits (§4.2.2.2).
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(reg::VIRTIO_MMIO_CONFIG.into()) {
            if self.registers.status & DRIVER != 0 {
                lock(&self.device).write_config(offset, data);
            }
        } else if let Ok(register) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(register));
        }
    }
}

/// The low (0) or high (1) half of a 64-bit value; other selectors read as
/// zero.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(target: &mut u64, select: u32, value: u32) {
    match select {
        0 => *target = *target & !0xffff_ffff | u64::from(value),
        1 => *target = *target & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
