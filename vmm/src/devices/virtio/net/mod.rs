//! The network device (virtio 1.2 §5.1), on a tap of the host.
//!
//! Packets go from guest memory to the tap and back without a copy. Checksums
//! and segmentation are left to whoever does them last: the header that guest
//! and kernel put before each packet is the same, `struct virtio_net_hdr_v1`,
//! and the device only passes it on ([`tap`]).
//!
//! What the kernel sends may be larger than the buffers that the guest has
//! given just now; [`rx`] says what happens then.

pub mod device;
mod event_handler;
pub mod persist;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;

pub use device::Net;
