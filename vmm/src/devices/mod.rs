//! Everything that the guest sees as hardware.

pub mod bus;
pub mod console;
pub mod serial;
pub mod virtio;
