//! The vsock device (virtio 1.2 §5.10), with unix sockets on the host's side.
//!
//! A stream between guest and host is one [`Connection`](connection::Connection):
//! a pair of ports in the guest's packets, and a unix socket here.
//!
//! ```text
//!            rx, tx queues          packets                  bytes
//!   driver <--------------> Vsock <---------> Muxer <--> Connection <--> unix socket
//! ```
//!
//! - A client on the host connects to the listener and says `CONNECT <port>\n`
//!   ([`handshake`]). When the guest has accepted, it is told `OK <port>\n` with
//!   the port that stands for it; when not, its connection is closed.
//! - The guest can connect to one port of the host, once, to say that it is
//!   ready: a socket for that came with the device. So the process needs no way
//!   to make connections of its own.
//!
//! Both directions are flow-controlled ([`credit`]), and both can be closed
//! alone. What the guest has sent, and the unix socket does not take yet, waits
//! in the connection's buffer, at most [`credit::BUFFER_SIZE`] bytes; what the
//! host has sent waits in its unix socket until the guest has room. So neither
//! side can make the other one lose or hold bytes without a bound.
//!
//! Nothing blocks: the event loop's thread does all of the work, in portions.

pub mod connection;
pub mod credit;
pub mod device;
mod event_handler;
pub mod handshake;
pub mod muxer;
pub mod packet;
pub mod persist;
mod slab;
#[cfg(test)]
mod tests;

pub use device::Vsock;
pub use muxer::HostPort;
