//! Generated types of the two gRPC interfaces of Husk: CRI, and the agent's.

/// The Kubernetes Container Runtime Interface, version 1.
#[cfg(feature = "cri")]
#[allow(missing_docs, clippy::all)]
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

pub mod agent;
