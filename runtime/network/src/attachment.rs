//! The result of connecting a pod: its addresses, interfaces, routes and name service.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// A connected pod, as its machine and its agent need to know it.
#[derive(Debug)]
pub struct Attachment {
    /// The file that pins the namespace.
    pub netns: PathBuf,
    /// The pod's addresses, the main one first.
    pub ips: Vec<IpAddr>,
    /// The guest's interfaces, the main one first.
    pub interfaces: Vec<GuestInterface>,
    /// The guest's routes in the order in which they can be added.
    pub routes: Vec<Route>,
    /// Name service as the CNI plugins want it.
    pub dns: Dns,
}

/// A network interface of the guest.
#[derive(Debug)]
pub struct GuestInterface {
    /// The name, for example "eth0".
    pub name: String,
    /// The MAC that the network knows it by.
    pub mac: [u8; 6],
    /// The largest packet, bytes, without the Ethernet header.
    pub mtu: u16,
    /// Addresses with their prefix, for example "10.88.0.5/16".
    pub addresses: Vec<String>,
    /// The tap, non-blocking and with `IFF_VNET_HDR`, which the kernel removes with its last
    /// descriptor. `None` for the tap that was handed out early.
    pub tap: Option<OwnedFd>,
}

/// A route of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The destination with its prefix, for example "0.0.0.0/0".
    pub destination: String,
    /// The gateway; `None` for a route on the link.
    pub gateway: Option<IpAddr>,
    /// Name of the guest's interface.
    pub interface: String,
}

/// Configuration of name service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of servers.
    pub servers: Vec<String>,
    /// Domains that are searched.
    pub searches: Vec<String>,
    /// Options of `resolv.conf`.
    pub options: Vec<String>,
}
