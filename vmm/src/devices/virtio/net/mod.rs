//! The network device (virtio 1.2 §5.1), on a tap of the host.
//!
//! Packets go from guest memory to the tap and back without a copy. Checksums
//! and segmentation are left to the last hop: guest and kernel use the same
//! header before each packet, `struct virtio_net_hdr_v1`, and the device only
//! passes it on ([`tap`]).
//!
//! A packet of the kernel may be larger than the buffers that the guest has
//! made available; [`rx`] says how that is handled.

pub mod device;
mod event_handler;
pub mod persist;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;

pub use device::Net;
