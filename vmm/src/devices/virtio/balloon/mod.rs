//! The memory balloon (virtio 1.2 §5.5), with free page reporting.
//!
//! Pages that the guest puts into the balloon, or reports as free, are released
//! to the host ([`pages`]); the guest gets fresh ones when it touches them
//! again. Both are advisory: pages that cannot be released stay where they are.

pub mod device;
mod event_handler;
mod pages;
pub mod persist;
#[cfg(test)]
mod tests;

pub use device::Balloon;
