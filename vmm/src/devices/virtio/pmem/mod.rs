//! Persistent memory (virtio 1.2 §5.19): a range of guest-physical memory that
//! is a file of the host.
//!
//! The range itself is mapped with the rest of memory, see
//! [`memory::allocate`](crate::memory::allocate); the device tells the driver
//! where it is, and answers its flushes. The file is mapped privately, so there
//! is never anything to flush.

pub mod device;
mod event_handler;
pub mod persist;
#[cfg(test)]
mod tests;

pub use device::Pmem;
