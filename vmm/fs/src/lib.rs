//! Husk's file server: serves a pod's volumes to its machine.
//!
//! `husk-vmm` sends each FUSE request of the guest as one packet over a
//! `SOCK_SEQPACKET` socket, and gets one packet back ([`server`]). The server
//! executes requests on the real file system ([`passthrough`]), below one
//! directory in which huskd mounts the pod's volumes.
//!
//! The requests come from a hostile guest. Three things keep it to its volumes:
//!
//! - The process lives in a mount namespace whose root is that directory, as
//!   `root` without the capabilities that reach beyond files ([`jail`]), and
//!   without any system call that does ([`filter`]).
//! - A file is named by the descriptor that it was found through, never by a
//!   path. Names have one component, and links are never followed: the guest's
//!   kernel resolves them.
//! - A guest cannot write what the server cannot write: the mounts of read-only
//!   volumes are read-only here.
//!
//! The guest's kernel checks permissions within a volume, as for any disk of
//! its own. Files are made as the user that it names ([`identity`]), as far as
//! the pod's [`policy`] allows.

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

/// A failure, as the errno that the guest gets.
pub type Errno = rustix::io::Errno;
