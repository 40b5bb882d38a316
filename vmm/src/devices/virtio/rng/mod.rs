//! The entropy device (virtio 1.2 §5.4): random bytes from the host's kernel.
//!
//! A guest may ask for them without end, so it gets a limited number per
//! period; then the device rests until the next one.

pub mod device;
mod event_handler;
pub mod persist;
#[cfg(test)]
mod tests;

pub use device::Rng;
