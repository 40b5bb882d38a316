//! The virtio block device (virtio 1.2 §5.2).
//!
//! A request goes this way:
//!
//! 1. The driver's notification wakes one of the [`pool`]'s threads.
//! 2. The thread takes a descriptor chain off the queue under the [`device`]'s
//!    lock, and makes a [`request`] of it.
//! 3. Without the lock, the [`disk`] moves data between its file and guest
//!    memory.
//! 4. The thread takes the lock again to return the chain.
//!
//! So a slow file holds up a thread of the pool, and neither the event loop nor
//! a vCPU.
//!
//! A device may be a *slot*: it starts without a disk, as a device of capacity
//! zero, and gets one while the machine runs. The driver learns of it by a
//! configuration change interrupt.

pub mod device;
pub mod disk;
pub mod persist;
pub mod pool;
pub mod request;

#[cfg(test)]
mod tests;

pub use device::{Block, BlockError};
pub use disk::Disk;
pub use persist::BlockState;
pub use pool::IoPool;

/// Bytes of a sector, the unit of all positions and sizes in requests.
pub const SECTOR: u64 = 512;
/// Bytes of a serial number (`VIRTIO_BLK_ID_BYTES`).
pub const SERIAL_LENGTH: usize = virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES as usize;
