//! Virtio devices (virtio 1.2), each in a folder of its own.

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod config;
pub mod device;
pub mod fs;
pub mod interrupt;
pub mod kinds;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod rate;
pub mod rings;
pub mod rng;
#[cfg(test)]
pub(crate) mod test_utils;
pub mod vsock;
pub mod watch;
