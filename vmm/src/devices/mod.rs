//! Everything that the guest sees as hardware.

pub mod bus;
pub mod serial;
pub mod virtio;
