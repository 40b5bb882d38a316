//! The CRI server: one file per RPC. Each translates a request into an operation of
//! [`husk_pods`], and the answer back; [`status`] chooses the gRPC code of an error.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod attach;
mod batches;
mod container_events;
mod containers;
mod create_container;
mod exec;
mod exec_sync;
#[cfg(test)]
mod fields;
mod image_service;
mod metrics;
mod node_info;
mod pod_stats;
mod run_pod_sandbox;
mod runtime_service;
mod sandboxes;
mod serve;
mod stats;
mod status;
#[cfg(test)]
mod tests;
mod update_resources;

pub use serve::serve;
