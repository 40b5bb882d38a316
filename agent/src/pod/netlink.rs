//! Interfaces, addresses and routes, as the host's CNI plugins chose them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use husk_proto::agent::{Interface, Route};
use netlink_packet_route::address::AddressHeaderFlags;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

/// The index of the loopback interface in every network namespace.
const LOOPBACK: u32 = 1;

/// Most bytes of an interface name (`IFNAMSIZ` less its end).
const MAX_NAME: usize = 15;

/// The network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is invalid.
    #[error("{0}")]
    Invalid(String),
    /// No device has the hardware address.
    #[error("no network device has the hardware address {0}")]
    NoDevice(String),
    /// The kernel refused a request.
    #[error("{doing}: {cause}")]
    Kernel { doing: String, cause: io::Error },
}

/// An address and the prefix length of its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    fn parse(text: &str) -> Result<Self, Error> {
        let parsed = text.split_once('/').and_then(|(address, length)| {
            let prefix = Self { address: address.parse().ok()?, length: length.parse().ok()? };
            let longest = if prefix.address.is_ipv4() { 32 } else { 128 };
            (prefix.length <= longest).then_some(prefix)
        });
        parsed.ok_or_else(|| Error::Invalid(format!("{text:?} is not an address with a prefix length")))
    }

    fn contains(&self, other: IpAddr) -> bool {
        // The bits that differ, left-aligned in 128.
        let difference = match (self.address, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(a.to_bits() ^ b.to_bits()) << 96,
            (IpAddr::V6(a), IpAddr::V6(b)) => a.to_bits() ^ b.to_bits(),
            _ => return false,
        };
        difference.leading_zeros() >= u32::from(self.length)
    }

    /// The network that the address is in.
    fn network(&self) -> IpAddr {
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.length)).unwrap_or(0);
                Ipv4Addr::from_bits(address.to_bits() & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.length)).unwrap_or(0);
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        }
    }
}

/// A route in the form in which the kernel gets it.
#[derive(Debug, PartialEq, Eq)]
struct PlannedRoute {
    destination: Prefix,
    gateway: Option<IpAddr>,
    interface: String,
    /// Whether the gateway is in none of the interface's networks. The kernel
    /// must then be told that it can be reached on the link.
    on_link: bool,
}

/// The addresses of these interfaces, without the prefix lengths.
pub fn addresses(interfaces: &[Interface]) -> Result<Vec<IpAddr>, Error> {
    let all = interfaces.iter().flat_map(|interface| &interface.addresses);
    all.map(|address| Prefix::parse(address).map(|prefix| prefix.address)).collect()
}

/// Brings up loopback and these interfaces, and adds the routes.
pub async fn configure(interfaces: &[Interface], routes: &[Route]) -> Result<(), Error> {
    let routes = plan_routes(interfaces, routes)?;
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|cause| Error::Kernel { doing: "open netlink".into(), cause })?;
    let connection = tokio::spawn(connection);
    let configured = configure_over(&handle, interfaces, &routes).await;
    connection.abort();
    configured
}

async fn configure_over(
    handle: &Handle,
    interfaces: &[Interface],
    routes: &[PlannedRoute],
) -> Result<(), Error> {
    let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
    handle.link().set(up).execute().await.map_err(kernel(|| "bring up loopback".into()))?;
    let mut indices = Vec::new();
    for interface in interfaces {
        indices.push((interface.name.as_str(), add_interface(handle, interface).await?));
    }
    for route in routes {
        let index = indices.iter().find(|(name, _)| *name == route.interface).map_or(0, |(_, index)| *index);
        match handle.route().add(route_message(route, index)?).execute().await {
            Err(error) if errno(&error) == Some(libc::EEXIST) => {}
            other => other.map_err(kernel(|| {
                let to = format!("{}/{}", route.destination.address, route.destination.length);
                let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
                format!("add route {to}{via} on {}", route.interface)
            }))?,
        }
    }
    Ok(())
}

async fn add_interface(handle: &Handle, interface: &Interface) -> Result<u32, Error> {
    let name = &interface.name;
    let mac = parse_mac(&interface.mac)?;
    let device = if interface.device_mac.is_empty() { mac } else { parse_mac(&interface.device_mac)? };
    let index = find_by_mac(handle, &device).await?.ok_or_else(|| Error::NoDevice(interface.mac.clone()))?;

    // Neither name nor address can change while the interface is up.
    let mut settings = LinkUnspec::new_with_index(index).name(name.clone());
    if device != mac {
        settings = settings.address(mac.to_vec());
    }
    if interface.mtu != 0 {
        settings = settings.mtu(interface.mtu);
    }
    for (doing, settings) in [
        ("take down", LinkUnspec::new_with_index(index).down()),
        ("name", settings),
        ("bring up", LinkUnspec::new_with_index(index).up()),
    ] {
        let set = handle.link().set(settings.build()).execute().await;
        set.map_err(kernel(|| format!("{doing} interface {name} ({})", interface.mac)))?;
    }
    for text in &interface.addresses {
        let Prefix { address, length } = Prefix::parse(text)?;
        let mut request = handle.address().add(index, address, length);
        if address.is_ipv6() {
            // CNI guarantees that the address is free; waiting for duplicate
            // address detection would make the pod start a second later (RFC
            // 4862 §5.4).
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        match request.execute().await {
            Err(error) if errno(&error) == Some(libc::EEXIST) => {}
            other => other.map_err(kernel(|| format!("add address {text} to {name}")))?,
        }
    }
    Ok(index)
}

async fn find_by_mac(handle: &Handle, mac: &[u8; 6]) -> Result<Option<u32>, Error> {
    let mut links = handle.link().get().execute();
    let mut found = None;
    // Read to the end even if the link is found: an unfinished dump leaves
    // replies behind.
    while let Some(link) = links.try_next().await.map_err(kernel(|| "list interfaces".into()))? {
        let is_it = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::Address(address) if address == mac);
        if link.attributes.iter().any(is_it) {
            found = Some(link.header.index);
        }
    }
    Ok(found)
}

/// Checks the routes against the interfaces, and sorts them into an order that the
/// kernel accepts: networks on the link come before the gateways in them.
fn plan_routes(interfaces: &[Interface], routes: &[Route]) -> Result<Vec<PlannedRoute>, Error> {
    let mut networks = Vec::new();
    for interface in interfaces {
        check_interface(interface)?;
        for address in &interface.addresses {
            networks.push((interface.name.as_str(), Prefix::parse(address)?));
        }
    }
    let mut planned = Vec::new();
    for route in routes {
        let destination = Prefix::parse(&route.destination)?;
        if !interfaces.iter().any(|interface| interface.name == route.interface) {
            return Err(Error::Invalid(format!(
                "route {} is on the interface {:?}, which the pod does not have",
                route.destination, route.interface
            )));
        }
        let gateway = match route.gateway.as_str() {
            "" => None,
            text => match text.parse::<IpAddr>() {
                Ok(gateway) if gateway.is_ipv4() == destination.address.is_ipv4() => Some(gateway),
                _ => {
                    return Err(Error::Invalid(format!(
                        "route {}: {text:?} is not a gateway for it",
                        route.destination
                    )));
                }
            },
        };
        if gateway.is_none() {
            networks.push((route.interface.as_str(), destination));
        }
        planned.push(PlannedRoute {
            destination,
            gateway,
            interface: route.interface.clone(),
            on_link: false,
        });
    }
    for route in &mut planned {
        if let Some(gateway) = route.gateway {
            let reachable =
                |(name, network): &(&str, Prefix)| *name == route.interface && network.contains(gateway);
            // A link-local gateway can be reached on every link (RFC 4861
            // §6.2.1).
            let link_local = matches!(gateway, IpAddr::V6(gateway) if gateway.is_unicast_link_local());
            route.on_link = !link_local && !networks.iter().any(reachable);
        }
    }
    planned.sort_by_key(|route| route.gateway.is_some());
    Ok(planned)
}

fn check_interface(interface: &Interface) -> Result<(), Error> {
    let name = &interface.name;
    let illegal = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name.is_empty() || name.len() > MAX_NAME || name == "." || name == ".." || name.contains(illegal) {
        return Err(Error::Invalid(format!("{name:?} is not a name for an interface")));
    }
    parse_mac(&interface.mac).map(|_| ())
}

fn parse_mac(text: &str) -> Result<[u8; 6], Error> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten())
        .collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Error::Invalid(format!("{text:?} is not a hardware address")))
}

fn route_message(route: &PlannedRoute, index: u32) -> Result<RouteMessage, Error> {
    let invalid = |error| Error::Invalid(format!("route {}: {error}", route.destination.address));
    // The kernel refuses a destination with host bits.
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .output_interface(index)
        .destination_prefix(route.destination.network(), route.destination.length)
        .map_err(invalid)?;
    builder = match route.gateway {
        Some(gateway) => builder.gateway(gateway).map_err(invalid)?,
        // IPv6 has no scopes.
        None => builder.scope(RouteScope::Link),
    };
    if route.on_link {
        builder = builder.onlink();
    }
    Ok(builder.build())
}

fn kernel(doing: impl FnOnce() -> String) -> impl FnOnce(rtnetlink::Error) -> Error {
    move |error| Error::Kernel {
        doing: doing(),
        cause: match errno(&error) {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::other(error),
        },
    }
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(addresses: &[&str]) -> Interface {
        Interface {
            name: "eth0".into(),
            mac: "02:00:0a:58:00:05".into(),
            mtu: 1500,
            addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
            device_mac: String::new(),
        }
    }

    fn route(destination: &str, gateway: &str) -> Route {
        Route { destination: destination.into(), gateway: gateway.into(), interface: "eth0".into() }
    }

    fn on_link(interface: &Interface, routes: &[Route]) -> Vec<(bool, bool)> {
        let planned = plan_routes(std::slice::from_ref(interface), routes).unwrap();
        planned.iter().map(|route| (route.gateway.is_some(), route.on_link)).collect()
    }

    #[test]
    fn a_gateway_in_the_interfaces_network_needs_nothing() {
        let eth0 = interface(&["10.88.0.5/16", "fd00::5/64"]);
        let routes = [route("0.0.0.0/0", "10.88.0.1"), route("::/0", "fd00::1"), route("::/0", "fe80::1")];
        assert_eq!(on_link(&eth0, &routes), [(true, false); 3]);
    }

    #[test]
    fn a_gateway_outside_of_it_is_declared_on_the_link() {
        let eth0 = interface(&["10.1.2.3/32"]);
        assert_eq!(on_link(&eth0, &[route("0.0.0.0/0", "169.254.1.1")]), [(true, true)]);
    }

    #[test]
    fn a_route_on_the_link_comes_first_and_makes_its_gateway_reachable() {
        let eth0 = interface(&["10.1.2.3/32"]);
        let routes = [route("0.0.0.0/0", "169.254.1.1"), route("169.254.1.1/32", "")];
        assert_eq!(on_link(&eth0, &routes), [(false, false), (true, false)]);
    }

    #[test]
    fn malformed_requests_are_refused() {
        let eth0 = interface(&["10.88.0.5/16"]);
        for (destination, gateway) in
            [("0.0.0.0/33", ""), ("::/129", ""), ("10.0.0.0", ""), ("0.0.0.0/0", "fd00::1"), ("::/0", "x")]
        {
            assert!(plan_routes(std::slice::from_ref(&eth0), &[route(destination, gateway)]).is_err());
        }
        let elsewhere = Route { interface: "eth1".into(), ..route("0.0.0.0/0", "") };
        assert!(plan_routes(std::slice::from_ref(&eth0), &[elsewhere]).is_err());
        for name in ["", "a/b", "a b", "sixteen-letters-", ".."] {
            assert!(plan_routes(&[Interface { name: name.into(), ..eth0.clone() }], &[]).is_err(), "{name}");
        }
        for mac in ["", "02:00:0a:58:00", "02:00:0a:58:00:0g", "2:0:a:58:0:5", "02:00:0a:58:00:05:06"] {
            assert!(plan_routes(&[Interface { mac: mac.into(), ..eth0.clone() }], &[]).is_err(), "{mac}");
        }
    }

    #[test]
    fn networks_contain_what_shares_their_prefix() {
        let contains =
            |network: &str, address: &str| Prefix::parse(network).unwrap().contains(address.parse().unwrap());
        assert!(contains("10.88.0.5/16", "10.88.255.1"));
        assert!(!contains("10.88.0.5/16", "10.89.0.1"));
        assert!(contains("0.0.0.0/0", "1.2.3.4"));
        assert!(contains("10.0.0.1/32", "10.0.0.1") && !contains("10.0.0.1/32", "10.0.0.0"));
        assert!(contains("fd00::5/64", "fd00::ffff") && !contains("fd00::5/64", "fd00:0:0:1::1"));
        assert!(!contains("::/0", "1.2.3.4"));
    }

    #[test]
    fn the_network_of_an_address_has_no_host_bits() {
        let network = |text: &str| Prefix::parse(text).unwrap().network().to_string();
        assert_eq!(network("10.88.3.5/16"), "10.88.0.0");
        assert_eq!(network("10.88.3.5/32"), "10.88.3.5");
        assert_eq!(network("1.2.3.4/0"), "0.0.0.0");
        assert_eq!(network("fd00::5/64"), "fd00::");
        assert_eq!(network("fd00::5/0"), "::");
    }
}
