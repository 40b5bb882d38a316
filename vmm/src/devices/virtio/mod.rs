//! Virtio devices (virtio 1.2), each in a folder of its own.

pub mod device;
pub mod interrupt;
pub mod mmio;
