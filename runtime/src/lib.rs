//! huskd, the CRI server of a node.
//!
//! A request arrives in [`cri`], where one file per verb tells its story; it
//! changes what [`sandbox`] and [`container`] keep, with the help of [`image`],
//! [`network`], [`storage`], [`vm`], [`apparmor`] and [`agent`]. Exec, attach and port-forward
//! come back over [`streaming`].

pub mod agent;
pub mod apparmor;
pub mod cdi;
pub mod config;
pub mod container;
pub mod cpu_rate;
pub mod cri;
pub mod events;
pub mod heap;
pub mod host;
pub mod instance;
pub mod node;
pub mod sandbox;
pub mod storage;
pub mod telemetry;
pub mod vm;

pub use husk_base::{dirs, id, mountinfo, random, text_file};
pub use {husk_image as image, husk_network as network, husk_streaming as streaming};
