//! huskd, the CRI server of a node.

pub mod image;
pub mod network;
