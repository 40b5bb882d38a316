//! The network device: its configuration, and one batch of work.

use std::io;
use std::os::fd::OwnedFd;

use nix::sys::timerfd::TimerFd;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

use super::rx::Receiver;
use super::tap::{HEADER_LEN, MAX_PACKET, Tap};
use super::tx::transmit;
use crate::devices::virtio::config;
use crate::devices::virtio::device::{ActivateError, Activation, VirtioDevice};
use crate::devices::virtio::interrupt::USED_RING;
use crate::devices::virtio::rate::{self, Limiter};
use crate::devices::virtio::rings::needs_interrupt;
use crate::devices::virtio::watch::QueueWatch;

/// The index of the queue that carries packets to the guest.
pub const RX: usize = 0;
/// The index of the queue that carries packets from the guest.
pub const TX: usize = 1;

const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Most packets in each direction before other devices get their turn.
const BATCH: usize = 64;

/// A network interface of the guest.
pub struct Net {
    pub(super) tap: Tap,
    pub(super) watch: QueueWatch,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    pub(super) limits: Limits,
    active: Option<Active>,
}

/// The rate limits of an interface.
#[derive(Debug, Default)]
pub(super) struct Limits {
    pub(super) receive: Option<Limiter>,
    pub(super) send: Option<Limiter>,
    /// The timer that ends when the device may continue; there is one if there
    /// are limits.
    pub(super) timer: Option<TimerFd>,
}

struct Active {
    activation: Activation,
    receiver: Receiver,
}

impl Net {
    /// Makes an interface on `tap`, a descriptor of `/dev/net/tun` that was set
    /// up with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    ///
    /// # Errors
    /// The descriptor is not a tap, or the process has too many open files.
    pub fn new(tap: OwnedFd, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        let limits = Limits::default();
        Ok(Self { tap: Tap::new(tap)?, watch: QueueWatch::new()?, mac, mtu, limits, active: None })
    }

    /// Makes an interface on a socket in the place of a tap.
    ///
    /// # Errors
    /// The process has too many open files.
    #[cfg(feature = "fuzzing")]
    pub fn on_socket(socket: OwnedFd, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        let limits = Limits::default();
        Ok(Self { tap: Tap::of_socket(socket), watch: QueueWatch::new()?, mac, mtu, limits, active: None })
    }

    /// Sets the rate limits, before the event loop knows the device.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn limit(&mut self, receive: Option<Limiter>, send: Option<Limiter>) -> io::Result<()> {
        let timer = (receive.is_some() || send.is_some()).then(rate::timer).transpose()?;
        self.limits = Limits { receive, send, timer };
        Ok(())
    }

    /// Notes that the tap has packets.
    pub(super) fn tap_is_readable(&mut self) {
        if let Some(active) = &mut self.active {
            active.receiver.readable = true;
        }
    }

    /// Moves packets both ways, at most a batch.
    pub(super) fn serve(&mut self) {
        let Some(Active { activation, receiver }) = &mut self.active else { return };
        let Activation { memory, queues, interrupt, .. } = activation;
        let [rx, tx] = queues.as_mut_slice() else { return };
        let before = (rx.next_used(), tx.next_used());
        let (mut to_send, mut to_receive) = (BATCH, BATCH);
        let Limits { receive, send, timer } = &mut self.limits;
        let waits = [
            transmit(&self.tap, memory, tx, send, &mut to_send),
            receiver.receive(&self.tap, memory, rx, receive, &mut to_receive),
        ];
        if let (Some(timer), Some(wait)) = (timer, waits.into_iter().flatten().min()) {
            rate::set(timer, wait);
        }
        if needs_interrupt(rx, memory, before.0) || needs_interrupt(tx, memory, before.1) {
            interrupt.trigger(USED_RING);
        }
        if to_send == 0 || to_receive == 0 {
            self.watch.wake();
        }
    }

    /// `struct virtio_net_config` (virtio 1.2 §5.1.4).
    fn config(&self) -> [u8; 12] {
        let mut space = [0; 12];
        let [mac @ .., _, _, _, _, mtu_low, mtu_high] = &mut space;
        mac.copy_from_slice(&self.mac);
        [*mtu_low, *mtu_high] = self.mtu.to_le_bytes();
        space
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MRG_RXBUF,
        ]
        .into_iter()
        .fold(self.tap.features(), |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let accepted = |bit: u32| activation.features & (1 << bit) != 0;
        let large = [
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
        ]
        .into_iter()
        .any(accepted);
        let longest = if large { MAX_PACKET } else { HEADER_LEN + 18 + usize::from(self.mtu) };
        let receiver = Receiver::new(accepted(VIRTIO_NET_F_MRG_RXBUF), longest);
        self.tap.accept(activation.features).map_err(|error| ActivateError {
            device: "net",
            cause: format!("set the tap's offloads: {error}"),
        })?;
        activation.begin("net", QUEUE_SIZES.len(), &mut self.watch)?;
        self.active = Some(Active { activation, receiver });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.watch.reset();
        // The call fails only if the interface is gone, and then no packet comes.
        let _ = self.tap.accept(0);
    }

    fn activation(&self) -> Option<&Activation> {
        self.active.as_ref().map(|active| &active.activation)
    }
}
