//! The tap: a descriptor of `/dev/net/tun` (Linux
//! `Documentation/networking/tuntap.rst`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

use crate::devices::virtio::buffers::IoVecs;

/// Bytes of `struct virtio_net_hdr_v1`, which comes before each packet.
pub const HEADER_LEN: usize = 12;

/// Most bytes of a packet: its header, Ethernet with a VLAN tag, and 64 KiB.
pub const MAX_PACKET: usize = HEADER_LEN + 18 + (64 << 10);

nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);
nix::ioctl_write_ptr_bad!(tun_set_vnet_hdr_size, libc::TUNSETVNETHDRSZ, libc::c_int);

/// Features by which the guest leaves work to the kernel. The kernel always
/// does it, except for UDP segmentation, which it knows since Linux 6.2.
const TO_KERNEL: [u32; 4] =
    [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN];

/// Features by which the kernel leaves work to the guest, with the tap's flag
/// for each.
const TO_GUEST: [(u32, u32); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// The tap supports these two only together.
const UDP_TO_GUEST: [u32; 2] = [VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6];
const UDP_OFFLOADS: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// An open tap, see the [module](self).
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    features: u64,
    /// A socket is in the place of the tap, which knows no offloads.
    #[cfg(feature = "fuzzing")]
    is_socket: bool,
}

impl Tap {
    /// Takes over a tap that was made with `IFF_TAP | IFF_NO_PI |
    /// IFF_VNET_HDR`.
    ///
    /// # Errors
    /// The descriptor is none of a tap.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let size = libc::c_int::try_from(HEADER_LEN).unwrap_or_default();
        // SAFETY: the ioctl reads one int.
        unsafe { tun_set_vnet_hdr_size(fd.as_raw_fd(), &raw const size) }?;

        let mut features = 0;
        for bit in TO_KERNEL.into_iter().chain(TO_GUEST.map(|(bit, _)| bit)) {
            features |= 1 << bit;
        }
        let tap = Self {
            fd,
            features,
            #[cfg(feature = "fuzzing")]
            is_socket: false,
        };
        let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        let features = match tap.set_offloads(tcp | UDP_OFFLOADS) {
            Ok(()) => {
                let bits = UDP_TO_GUEST.into_iter().chain([VIRTIO_NET_F_HOST_USO]);
                bits.fold(features, |features, bit| features | 1 << bit)
            }
            Err(_) => features,
        };
        // No offloads until a driver accepts some.
        tap.set_offloads(0)?;
        Ok(Self { features, ..tap })
    }

    /// The features of the network device that the tap makes possible.
    pub const fn features(&self) -> u64 {
        self.features
    }

    /// Tells the kernel which work a driver that accepted these features takes.
    pub fn accept(&self, features: u64) -> io::Result<()> {
        let accepted = |bit: u32| features & (1 << bit) != 0;
        if !accepted(VIRTIO_NET_F_GUEST_CSUM) {
            // The other offloads depend on this one (virtio 1.2 §5.1.3.1).
            return self.set_offloads(0);
        }
        let mut offloads = 0;
        for (bit, offload) in TO_GUEST {
            if accepted(bit) {
                offloads |= offload;
            }
        }
        if offloads & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
            offloads &= !libc::TUN_F_TSO_ECN;
        }
        if UDP_TO_GUEST.into_iter().all(accepted) {
            offloads |= UDP_OFFLOADS;
        }
        self.set_offloads(offloads)
    }

    /// A non-blocking socket that keeps the bounds of packets, with all the features that a tap can have.
    #[cfg(feature = "fuzzing")]
    pub fn of_socket(fd: OwnedFd) -> Self {
        let bits = TO_KERNEL.into_iter().chain(TO_GUEST.map(|(bit, _)| bit)).chain(UDP_TO_GUEST);
        let features = bits.fold(1 << VIRTIO_NET_F_HOST_USO, |features, bit| features | 1 << bit);
        Self { fd, features, is_socket: true }
    }

    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        #[cfg(feature = "fuzzing")]
        if self.is_socket {
            return Ok(());
        }
        // SAFETY: the ioctl takes a number.
        unsafe { tun_set_offload(self.fd.as_raw_fd(), offloads.cast_signed()) }?;
        Ok(())
    }

    /// Reads a packet.
    pub fn read(&self, into: &IoVecs<'_>) -> io::Result<usize> {
        into.readv(self.as_fd())
    }

    /// Writes a packet.
    pub fn write(&self, packet: &IoVecs<'_>) -> io::Result<usize> {
        packet.writev(self.as_fd())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
