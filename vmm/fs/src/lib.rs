//! Serves a pod's volumes to its machine.
//!
//! `husk-vmm` sends each FUSE request of the guest as one packet over a
//! `SOCK_SEQPACKET` socket, and gets one packet back ([`server`]). What a
//! request means is done to the real file system ([`passthrough`]), below one
//! directory in which huskd mounts the pod's volumes.
//!
//! The requests are a hostile guest's. Three things keep it to its volumes:
//! - The process lives in a mount namespace whose root is that directory, as
//!   `root` without the capabilities that reach beyond files ([`jail`]), and
//!   without any system call that does ([`filter`]).
//! - A file is named by the descriptor it was found through, never by a path.
//!   Names have one component, links are never followed: their target is a
//!   matter of the guest's kernel.
//! - What cannot be written on the host cannot be written by the guest: the
//!   mounts of read-only volumes are read-only here.
//!
//! Permissions within a volume are checked by the guest's kernel, as for any
//! disk of its own; files are made as the user that it names ([`identity`]), as
//! far as the pod's [`policy`] goes.

pub mod abi;
pub mod filter;
pub mod identity;
pub mod jail;
pub mod message;
pub mod passthrough;
pub mod policy;
pub mod server;

pub use passthrough::Passthrough;
pub use policy::Policy;

/// A failure as the guest sees it.
pub type Errno = rustix::io::Errno;
