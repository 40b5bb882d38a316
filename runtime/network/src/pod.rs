//! A pod that is to be connected.

use std::net::IpAddr;

/// A pod to connect.
#[derive(Clone, Copy, Debug)]
pub struct PodRef<'a> {
    /// Letters, digits, `_`, `.` and `-`.
    pub sandbox_id: &'a str,
    /// The namespace that Kubernetes has it in.
    pub namespace: &'a str,
    /// The name that it has there.
    pub name: &'a str,
    /// The uid that Kubernetes gave it.
    pub uid: &'a str,
    /// Ports of the host that lead to the pod.
    pub port_mappings: &'a [PortMapping],
    /// Limits of its traffic.
    pub bandwidth: Bandwidth,
    /// Whether frames that its machine sends in the name of others are dropped.
    pub filtered: bool,
}

/// Limits in bits per second; `None` for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// The limit of what the pod receives.
    pub ingress: Option<u64>,
    /// The limit of what the pod sends.
    pub egress: Option<u64>,
}

/// A port of the host that leads to one of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// 0 is for none: such a mapping is ignored, as CRI wants it.
    pub host_port: u16,
    /// The port of the pod.
    pub container_port: u16,
    /// The protocol of both ports.
    pub protocol: Protocol,
    /// The address of the host that the port is on; `None` for all of them.
    pub host_ip: Option<IpAddr>,
}

/// The protocol of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}
