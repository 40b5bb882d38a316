use event_manager::{EventOps, Events, MutEventSubscriber};
use proptest::prelude::*;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::GuestAddress;

use super::*;
use crate::devices::virtio::device::ActivateError;
use crate::devices::virtio::interrupt::USED_RING;

const EXTRA_FEATURE: u64 = 1 << 7;
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | EXTRA_FEATURE;

/// A device with two queues and eight bytes of configuration.
#[derive(Default)]
struct Plain {
    config: [u8; 8],
    activation: Option<Activation>,
    activations: u32,
    refuse: bool,
}

impl MutEventSubscriber for Plain {
    fn process(&mut self, _: Events, _: &mut EventOps) {}
    fn init(&mut self, _: &mut EventOps) {}
}

impl VirtioDevice for Plain {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let Some(target) = self.config.get_mut((offset as usize).saturating_add(i)) {
                *target = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.refuse {
            return Err(ActivateError { device: "plain", cause: "it was told to".into() });
        }
        self.activation = Some(activation);
        self.activations += 1;
        Ok(())
    }

    fn reset(&mut self) {
        self.activation = None;
    }

    fn activation(&self) -> Option<&Activation> {
        self.activation.as_ref()
    }
}

struct Machine {
    device: Arc<Mutex<Plain>>,
    transport: MmioTransport,
    memory: GuestMemoryMmap,
}

impl Machine {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let device = Arc::new(Mutex::new(Plain::default()));
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let transport = MmioTransport::new(device.clone(), memory.clone(), line).unwrap();
        Self { device, transport, memory }
    }

    fn get(&mut self, register: u32) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn put(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn negotiate(&mut self, features: u64) {
        self.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for select in 0..2 {
            self.put(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.put(reg::VIRTIO_MMIO_DRIVER_FEATURES, half(features, select));
        }
        self.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_up_queue(&mut self, index: u32, size: u32) {
        let memory = self.memory.clone();
        let base = GuestAddress(0x1000 * (u64::from(index) + 1));
        let mock = MockSplitQueue::create(&memory, base, size as u16);
        self.put(reg::VIRTIO_MMIO_QUEUE_SEL, index);
        self.put(reg::VIRTIO_MMIO_QUEUE_NUM, size);
        self.put(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, mock.desc_table_addr().0 as u32);
        self.put(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, mock.avail_addr().0 as u32);
        self.put(reg::VIRTIO_MMIO_QUEUE_USED_LOW, mock.used_addr().0 as u32);
        self.put(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn start(&mut self) {
        self.negotiate(FEATURES);
        self.set_up_queue(0, 16);
        self.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }
}

#[test]
fn a_driver_recognises_the_device() {
    let mut machine = Machine::new();
    assert_eq!(machine.get(reg::VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(machine.get(reg::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(machine.get(reg::VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(machine.get(reg::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    let mut features = 0;
    for select in 0..3 {
        machine.put(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        set_half(&mut features, select, machine.get(reg::VIRTIO_MMIO_DEVICE_FEATURES));
    }
    assert_eq!(features, FEATURES);
    machine.put(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(machine.get(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 8);
    machine.put(reg::VIRTIO_MMIO_QUEUE_SEL, 2);
    assert_eq!(machine.get(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
}

#[test]
fn the_device_gets_the_queues_as_the_driver_set_them_up() {
    let mut machine = Machine::new();
    machine.start();
    assert_eq!(machine.get(reg::VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    let device = machine.device.lock().unwrap();
    let activation = device.activation().unwrap();
    assert_eq!(activation.features, FEATURES);
    assert!(activation.queues[0].ready() && !activation.queues[1].ready());
    assert_eq!(activation.queues[0].size(), 16);
    assert!(activation.queues[0].event_idx_enabled());
}

#[test]
fn features_that_are_not_offered_or_too_old_are_refused() {
    for features in [FEATURES | 1, EXTRA_FEATURE, 0] {
        let mut machine = Machine::new();
        machine.negotiate(features);
        assert_eq!(machine.get(reg::VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER, "{features:#x}");
        machine.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
        assert!(machine.device.lock().unwrap().activation().is_none());
    }
}

#[test]
fn features_are_fixed_once_agreed_upon() {
    let mut machine = Machine::new();
    machine.negotiate(FEATURES);
    machine.put(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    machine.put(reg::VIRTIO_MMIO_DRIVER_FEATURES, 0);
    machine.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(machine.device.lock().unwrap().activation().unwrap().features, FEATURES);
}

#[test]
fn a_queue_outside_of_memory_needs_a_reset() {
    let mut machine = Machine::new();
    machine.negotiate(FEATURES);
    machine.set_up_queue(0, 16);
    machine.put(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    machine.put(reg::VIRTIO_MMIO_QUEUE_USED_HIGH, 1);
    machine.put(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    machine.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(machine.get(reg::VIRTIO_MMIO_STATUS) & (NEEDS_RESET | DRIVER_OK), NEEDS_RESET);
    assert_eq!(machine.get(reg::VIRTIO_MMIO_INTERRUPT_STATUS), CONFIG_CHANGE);
    machine.put(reg::VIRTIO_MMIO_STATUS, 0);
    machine.start();
    assert_eq!(machine.device.lock().unwrap().activations, 1);
}

#[test]
fn sizes_that_no_queue_can_have_are_refused() {
    for size in [0, 3, 32, 0x1_0010] {
        let mut machine = Machine::new();
        machine.negotiate(FEATURES);
        machine.set_up_queue(0, 16);
        machine.put(reg::VIRTIO_MMIO_QUEUE_READY, 0);
        machine.put(reg::VIRTIO_MMIO_QUEUE_NUM, size);
        machine.put(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        machine.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert!(machine.device.lock().unwrap().activation().is_none(), "{size}");
    }
}

#[test]
fn a_device_that_refuses_needs_a_reset() {
    let mut machine = Machine::new();
    machine.device.lock().unwrap().refuse = true;
    machine.start();
    assert_ne!(machine.get(reg::VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
}

#[test]
fn a_reset_makes_everything_new() {
    let mut machine = Machine::new();
    machine.start();
    machine.transport.interrupt().trigger(USED_RING);
    machine.put(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    machine.put(reg::VIRTIO_MMIO_STATUS, 0);
    assert!(machine.device.lock().unwrap().activation().is_none());
    for register in [reg::VIRTIO_MMIO_STATUS, reg::VIRTIO_MMIO_INTERRUPT_STATUS, reg::VIRTIO_MMIO_QUEUE_READY]
    {
        assert_eq!(machine.get(register), 0);
    }
    assert!(machine.transport.queue_events()[0].read().is_err());
    machine.start();
    assert_eq!(machine.device.lock().unwrap().activations, 2);
}

#[test]
fn a_second_driver_ok_does_not_activate_again() {
    let mut machine = Machine::new();
    machine.start();
    machine.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    machine.put(reg::VIRTIO_MMIO_STATUS, DRIVER_OK);
    assert_eq!(machine.device.lock().unwrap().activations, 1);
}

#[test]
fn the_driver_reads_and_acknowledges_the_cause_of_an_interrupt() {
    let mut machine = Machine::new();
    let interrupt = machine.transport.interrupt().clone();
    interrupt.trigger(USED_RING);
    interrupt.trigger(CONFIG_CHANGE);
    assert_eq!(interrupt.line().read().unwrap(), 2);
    assert_eq!(machine.get(reg::VIRTIO_MMIO_INTERRUPT_STATUS), USED_RING | CONFIG_CHANGE);
    machine.put(reg::VIRTIO_MMIO_INTERRUPT_ACK, USED_RING);
    assert_eq!(machine.get(reg::VIRTIO_MMIO_INTERRUPT_STATUS), CONFIG_CHANGE);
}

#[test]
fn a_changed_configuration_has_another_generation() {
    let mut machine = Machine::new();
    let before = machine.get(reg::VIRTIO_MMIO_CONFIG_GENERATION);
    machine.transport.interrupt().trigger(CONFIG_CHANGE);
    assert_ne!(machine.get(reg::VIRTIO_MMIO_CONFIG_GENERATION), before);
}

#[test]
fn configuration_is_reached_in_any_width() {
    let mut machine = Machine::new();
    machine.put(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    machine.transport.write(0x102, &[7]);
    let mut data = [0xff; 8];
    machine.transport.read(0x100, &mut data);
    assert_eq!(data, [0, 0, 7, 0, 0, 0, 0, 0]);
    machine.transport.read(0x104, &mut data);
    assert_eq!(data, [0; 8], "bytes beyond the end are zero");
}

#[test]
fn a_notification_reaches_its_queue_without_kvm_too() {
    let mut machine = Machine::new();
    machine.put(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    machine.put(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 2);
    assert!(machine.transport.queue_events()[0].read().is_err());
    assert_eq!(machine.transport.queue_events()[1].read().unwrap(), 1);
}

#[test]
fn a_saved_transport_goes_on_where_it_was() {
    let mut machine = Machine::new();
    machine.start();
    machine.device.lock().unwrap().activation.as_mut().unwrap().queues[0].set_next_avail(5);
    machine.device.lock().unwrap().activation.as_mut().unwrap().queues[0].set_next_used(4);
    machine.transport.interrupt().trigger(CONFIG_CHANGE);
    let saved = machine.transport.save();

    let mut twin = Machine::new();
    twin.transport.restore(saved.clone()).unwrap();
    assert_eq!(twin.transport.save(), saved);
    assert_eq!(twin.get(reg::VIRTIO_MMIO_INTERRUPT_STATUS), CONFIG_CHANGE);
    let device = twin.device.lock().unwrap();
    let queue = &device.activation().unwrap().queues[0];
    assert_eq!((queue.next_avail(), queue.next_used(), queue.event_idx_enabled()), (5, 4, true));
    assert_eq!(twin.transport.queue_events()[0].read().unwrap(), 1, "the device looks at its queues");
}

#[test]
fn a_state_of_something_else_is_refused() {
    let saved = Machine::new().transport.save();
    let refused = |state| Machine::new().transport.restore(state).unwrap_err();
    assert!(matches!(
        refused(TransportState { version: 9, ..saved.clone() }),
        TransportRestoreError::Version(9)
    ));
    assert!(matches!(
        refused(TransportState { device_type: 1, ..saved.clone() }),
        TransportRestoreError::OtherDevice
    ));
    let mut active = saved;
    active.registers.status = DRIVER_OK;
    active.registers.queues[0].ready = true;
    active.registers.queues[0].used = 1 << 40;
    assert!(matches!(refused(active), TransportRestoreError::Queue(_)));
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics(
        accesses in prop::collection::vec((any::<bool>(), 0u64..0x120, 1usize..9, any::<u64>()), 0..200)
    ) {
        let mut machine = Machine::new();
        for (write, offset, length, value) in accesses {
            let mut data = value.to_le_bytes();
            if write {
                machine.transport.write(offset, &data[..length]);
            } else {
                machine.transport.read(offset, &mut data[..length]);
            }
        }
        let state = machine.transport.save();
        Machine::new().transport.restore(state).unwrap();
    }

    #[test]
    fn no_status_sequence_activates_without_agreement(statuses in prop::collection::vec(0u32..256, 0..20)) {
        let mut machine = Machine::new();
        for status in statuses {
            machine.put(reg::VIRTIO_MMIO_STATUS, status);
        }
        // VIRTIO_F_VERSION_1 was never accepted.
        prop_assert!(machine.device.lock().unwrap().activation().is_none());
    }
}
