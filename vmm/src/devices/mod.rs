//! Everything that the guest sees as hardware.

pub mod virtio;
