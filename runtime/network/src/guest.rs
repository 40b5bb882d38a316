//! The guest's interfaces, made from those that CNI made in a netns.
//!
//! Each one is paired with a tap: whatever arrives at one leaves by the other,
//! by tc filters on their ingress ([`super::tc`]), but for frames of the guest
//! whose sender is not the pod ([`super::filter`]). The filters take packets
//! before the namespace's own stack sees them, so it answers neither ARP nor
//! neighbour solicitations, although the addresses stay where CNI put them. They
//! must stay: plugins read them back on DEL to know which firewall rules are
//! theirs.
//!
//! The guest gets what is really configured in the namespace and not what the
//! plugins printed: some (ptp, Calico) add routes that are in no result.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use futures::TryStreamExt;
use ipnet::IpNet;
use libc::sock_filter;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{LinkUnspec, RouteMessageBuilder};

use super::attachment::{GuestInterface, Route};
use super::{filter, tap, tc};

/// Most interfaces of a pod; each is a device of its machine.
const MAX_INTERFACES: usize = 8;

/// A step that the kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step of huskd's own.
    #[error("{step}")]
    Kernel {
        /// The step, for example "make the tap of eth0".
        step: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The plugins left no interface that is up.
    #[error("the CNI plugins made no Ethernet interface {0} in the pod's network namespace")]
    NoInterface(String),
    /// There are more than [`MAX_INTERFACES`] interfaces.
    #[error("the CNI plugins made {0} interfaces, and a pod can have {MAX_INTERFACES}")]
    TooMany(usize),
    /// More addresses than there is room for in a filter.
    #[error(transparent)]
    Filter(#[from] filter::TooManyAddresses),
}

impl Error {
    /// There was no connection to the kernel's rtnetlink.
    pub fn rtnetlink(source: io::Error) -> Self {
        Self::Kernel { step: "reach rtnetlink".into(), source }
    }
}

/// The guest's side of a pod's network.
#[derive(Debug)]
pub struct Guest {
    /// Interfaces with their taps, the main one first.
    pub interfaces: Vec<GuestInterface>,
    /// Routes in the order in which they can be added.
    pub routes: Vec<Route>,
}

/// The interface that CNI was asked for.
#[derive(Clone, Debug)]
pub struct Main {
    /// The name, "eth0".
    pub name: String,
    /// Addresses in the plugins' result. They matter where a plugin leaves it
    /// to the machine to configure them.
    pub addresses: Vec<IpNet>,
}

/// An interface of the namespace.
struct Link {
    index: u32,
    name: String,
    mac: [u8; 6],
    mtu: u16,
}

/// A route of the namespace.
#[derive(Clone, Debug, PartialEq)]
struct HostRoute {
    destination: IpNet,
    gateway: Option<IpAddr>,
    link: u32,
    /// The gateway is on the link although no route says so.
    onlink: bool,
    /// The kernel made it because of an address.
    kernel: bool,
}

/// Makes the tap of the main interface, in the calling thread's namespace,
/// before the plugins make that interface.
///
/// # Errors
/// [`Error::Kernel`].
pub fn main_tap() -> Result<OwnedFd, Error> {
    tap::create(&tap_name(0))
        .map_err(|source| Error::Kernel { step: "make the tap of the main interface".into(), source })
}

fn tap_name(place: usize) -> String {
    format!("tap{place}_husk")
}

/// Joins every interface of the calling thread's namespace to a tap: the main
/// one to that of [`main_tap`], the others to their own. `main` is the one that
/// CNI was asked for; `filtered` is whether frames of the guest with another
/// sender are dropped.
///
/// # Errors
/// The kernel's reason. The taps are closed then; the filters end with the namespace.
pub async fn join(netlink: &rtnetlink::Handle, main: &Main, filtered: bool) -> Result<Guest, Error> {
    let links = links(netlink, &main.name).await?;
    let addresses = addresses(netlink).await?;
    let routes =
        [routes(netlink, AddressFamily::Inet).await?, routes(netlink, AddressFamily::Inet6).await?].concat();
    let mut interfaces = Vec::new();
    for (place, link) in links.iter().enumerate() {
        let tap = tap_name(place);
        let made = (place > 0)
            .then(|| tap::create(&tap))
            .transpose()
            .map_err(|source| Error::Kernel { step: format!("make the tap of {}", link.name), source })?;
        let of_link = addresses.iter().filter(|(index, _)| *index == link.index);
        let own: Vec<IpNet> = of_link.map(|(_, address)| *address).collect();
        let senders = if place == 0 && own.is_empty() { &main.addresses } else { &own };
        let program = filtered.then(|| filter::program(link.mac, senders)).transpose()?;
        join_one(netlink, link, &tap, program.as_deref()).await?;
        interfaces.push(GuestInterface {
            name: link.name.clone(),
            mac: link.mac,
            mtu: link.mtu,
            addresses: own.iter().map(|own| guest_address(*own, link.index, &routes).to_string()).collect(),
            tap: made,
        });
    }
    Ok(Guest { interfaces, routes: guest_routes(&links, routes) })
}

async fn links(netlink: &rtnetlink::Handle, main: &str) -> Result<Vec<Link>, Error> {
    let found: Vec<LinkMessage> =
        netlink.link().get().execute().try_collect().await.map_err(failed("list interfaces"))?;
    let mut links: Vec<Link> = found.iter().filter_map(usable).collect();
    // The main interface comes first; `false` sorts before `true`.
    links.sort_by_key(|link| (link.name != main, link.index));
    if links.first().is_none_or(|link| link.name != main) {
        return Err(Error::NoInterface(main.to_owned()));
    }
    if links.len() > MAX_INTERFACES {
        return Err(Error::TooMany(links.len()));
    }
    Ok(links)
}

/// A link that is Ethernet and up: that leaves out `lo` and the devices that some modules put
/// into every new namespace (`gretap0`, `erspan0`).
fn usable(message: &LinkMessage) -> Option<Link> {
    let header = &message.header;
    if header.link_layer_type != LinkLayerType::Ether || !header.flags.contains(LinkFlags::Up) {
        return None;
    }
    let (mut name, mut mac, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = <[u8; 6]>::try_from(value.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = Some(u16::try_from(*value).unwrap_or(u16::MAX)),
            _ => {}
        }
    }
    Some(Link { index: header.index, name: name?, mac: mac?, mtu: mtu? })
}

/// Addresses with the index of their interface, without IPv6 link-local ones:
/// the guest makes the same from the same MAC.
async fn addresses(netlink: &rtnetlink::Handle) -> Result<Vec<(u32, IpNet)>, Error> {
    let found: Vec<_> =
        netlink.address().get().execute().try_collect().await.map_err(failed("list addresses"))?;
    let mut addresses = Vec::new();
    for message in found {
        // Where IFA_ADDRESS is the peer's address, IFA_LOCAL is the interface's own.
        let (mut local, mut address) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(value) => local = Some(*value),
                AddressAttribute::Address(value) => address = Some(*value),
                _ => {}
            }
        }
        let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        if let Some(address) = local.or(address).filter(|ip| !link_local(ip))
            && let Ok(address) = IpNet::new(address, message.header.prefix_len)
        {
            addresses.push((message.header.index, address));
        }
    }
    Ok(addresses)
}

async fn routes(netlink: &rtnetlink::Handle, family: AddressFamily) -> Result<Vec<HostRoute>, Error> {
    let filter = match family {
        AddressFamily::Inet6 => RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        _ => RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
    };
    let found: Vec<RouteMessage> =
        netlink.route().get(filter).execute().try_collect().await.map_err(failed("list routes"))?;
    Ok(found.iter().filter_map(host_route).collect())
}

fn host_route(message: &RouteMessage) -> Option<HostRoute> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || header.protocol == RouteProtocol::Ra
    {
        return None;
    }
    let v6 = header.address_family == AddressFamily::Inet6;
    let mut destination = if v6 {
        IpAddr::from(std::net::Ipv6Addr::UNSPECIFIED)
    } else {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    };
    let (mut gateway, mut link) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => destination = ip(to)?,
            RouteAttribute::Gateway(via) => gateway = Some(ip(via)?),
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    let link_local = matches!(destination, IpAddr::V6(ip) if ip.is_unicast_link_local() || ip.is_multicast());
    let kernel = header.protocol == RouteProtocol::Kernel;
    if link_local && kernel {
        return None;
    }
    Some(HostRoute {
        destination: IpNet::new(destination, header.destination_prefix_length).ok()?,
        gateway,
        link: link?,
        onlink: header.flags.contains(RouteFlags::Onlink),
        kernel,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// An address in the form in which the guest is to configure it. Adding one with a prefix makes
/// the kernel route the whole prefix to the link; where a plugin has removed
/// that route (ptp does, to send all traffic to its gateway), the guest gets
/// the address alone so that its kernel makes none.
fn guest_address(own: IpNet, link: u32, routes: &[HostRoute]) -> IpNet {
    let connected = routes.iter().any(|route| {
        route.kernel
            && route.link == link
            && route.destination.prefix_len() == own.prefix_len()
            && route.destination.contains(&own.addr())
    });
    if connected { own } else { own.addr().into() }
}

/// The routes in the order in which the guest is to add them: those on the link come first, because
/// the others' gateways must be reachable, and a gateway that is "onlink" gets
/// a route of its own. Routes that the kernel made by itself are left out: the guest's kernel
/// makes them too.
fn guest_routes(links: &[Link], routes: Vec<HostRoute>) -> Vec<Route> {
    let mut wanted: Vec<HostRoute> = Vec::new();
    for route in routes.into_iter().filter(|route| !route.kernel) {
        if let Some(gateway) = route.gateway.filter(|_| route.onlink) {
            let to_gateway = HostRoute {
                destination: gateway.into(),
                gateway: None,
                link: route.link,
                onlink: false,
                kernel: false,
            };
            if !wanted.contains(&to_gateway) {
                wanted.push(to_gateway);
            }
        }
        wanted.push(route);
    }
    wanted.sort_by_key(|route| (route.gateway.is_some(), std::cmp::Reverse(route.destination.prefix_len())));
    let name = |index| links.iter().find(|link| link.index == index).map(|link| link.name.clone());
    let named = wanted.into_iter().filter_map(|route| {
        let interface = name(route.link)?;
        Some(Route { destination: route.destination.to_string(), gateway: route.gateway, interface })
    });
    named.collect()
}

/// Makes the filters between an interface and its tap, and brings the tap up.
async fn join_one(
    netlink: &rtnetlink::Handle,
    link: &Link,
    tap_name: &str,
    program: Option<&[sock_filter]>,
) -> Result<(), Error> {
    let step = |what: &str| format!("{what} of {}", link.name);
    let io_failed = |what: &str| {
        let step = step(what);
        move |source| Error::Kernel { step, source }
    };
    quieten(tap_name).map_err(io_failed("switch off IPv6 on the tap"))?;
    let tap = tc::index_of(netlink, tap_name).await.map_err(failed(step("find the tap")))?;
    // The filter comes before the tap is up, so that no frame of the guest passes it by.
    match program {
        Some(program) => tc::redirect_accepted(netlink, tap, link.index, program).await,
        None => tc::redirect(netlink, tap, link.index).await,
    }
    .map_err(failed(step("filter and redirect the traffic of the tap")))?;
    let up = LinkUnspec::new_with_index(tap).mtu(u32::from(link.mtu)).up().build();
    netlink.link().set(up).execute().await.map_err(failed(step("bring up the tap")))?;
    tc::redirect(netlink, link.index, tap).await.map_err(failed(step("redirect the traffic")))
}

/// Tries out what a pod's network needs of the kernel, in the calling thread's
/// namespace: taps, redirection between interfaces, and the filter of senders.
///
/// # Errors
/// The step that the kernel refuses.
pub async fn probe(netlink: &rtnetlink::Handle) -> Result<(), Error> {
    let names = ["probe0", "probe1"];
    let refused = |step: &str| {
        let step = step.to_owned();
        move |source| Error::Kernel { step, source }
    };
    let _taps = [
        tap::create(names[0]).map_err(refused("make a tap"))?,
        tap::create(names[1]).map_err(refused("make a second tap"))?,
    ];
    let first = tc::index_of(netlink, names[0]).await.map_err(failed("find a tap"))?;
    let second = tc::index_of(netlink, names[1]).await.map_err(failed("find a tap"))?;
    tc::redirect(netlink, first, second).await.map_err(failed("redirect traffic with tc"))?;
    let program = filter::program([2, 0, 0, 0, 0, 1], &[])?;
    let filtered = tc::redirect_accepted(netlink, second, first, &program).await;
    filtered.map_err(failed("filter traffic with tc"))
}

/// The namespace's kernel must not send its own neighbour discovery and
/// multicast reports into the guest.
#[expect(clippy::disallowed_methods, reason = "it runs on a thread of its own")]
fn quieten(interface: &str) -> io::Result<()> {
    // /proc/sys/net shows the namespace of the calling thread.
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1") {
        // The kernel has no IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}

fn failed(step: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    let step = step.into();
    move |error| {
        let source = match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other.to_string()),
        };
        Error::Kernel { step, source }
    }
}
