//! What the containers of a pod share: its network, names, namespaces, kernel
//! parameters and volumes.

pub mod apparmor;
pub mod etc;
pub mod live;
pub mod netlink;
pub mod ns;
pub mod port;
pub mod shared;
pub mod sysctl;
pub mod userns;
