//! The memory balloon (virtio 1.2 §5.5), with free page reporting.
//!
//! Pages that the guest puts into the balloon, or reports as free, are given
//! back to the host ([`pages`]); the guest gets fresh ones when it touches them
//! again. Both are advice: what cannot be given back stays where it is.

pub mod device;
mod event_handler;
mod pages;
pub mod persist;
#[cfg(test)]
mod tests;

pub use device::Balloon;
