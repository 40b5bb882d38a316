//! The parts of a pod that its containers share: network, names, namespaces,
//! kernel parameters and volumes.

pub mod apparmor;
pub mod etc;
pub mod netlink;
pub mod ns;
pub mod port;
pub mod shared_dir;
pub mod synced;
pub mod sysctl;
pub mod userns;
