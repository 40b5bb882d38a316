//! The file system device (virtio 1.2 §5.11): passes the guest's FUSE requests
//! to a server in another process.
//!
//! The device knows nothing of files. It takes a request off a virtqueue, sends
//! it as one packet over a `SOCK_SEQPACKET` socket, and puts the packet that
//! comes back into the guest's buffers. Guest memory is not shared with the
//! server: it may be a template's, mapped privately, and the server needs none
//! of it.
//!
//! Of a FUSE message the device reads only the header. The guest's `unique`
//! could name two requests at once, so each request gets a number of the
//! device's on its way out, and its own number back on the answer
//! ([`in_flight`]).
//!
//! A device may start without a server; it gets one when the pod has its first
//! volume. Once the server has ended, every request is answered with `EIO`.

pub mod device;
mod event_handler;
mod header;
mod in_flight;
pub mod persist;
#[cfg(test)]
mod tests;

pub use device::{Fs, FsError};
pub use event_handler::start;
