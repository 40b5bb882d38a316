//! The program as the kernel runs it, on a socket of the test's own: a filter
//! of a datagram socket sees a datagram as one at a tap sees a frame.
#![allow(clippy::indexing_slicing)]

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;

use super::*;

const MAC: [u8; 6] = [0x0a, 0x58, 0x0a, 0x4d, 0x00, 0x05];
const OTHER_MAC: [u8; 6] = [0x0a, 0x58, 0x0a, 0x4d, 0x00, 0x06];
const LINK_LOCAL: &str = "fe80::858:aff:fe4d:5";

/// The program for some addresses, where the kernel runs it.
struct Filter {
    sender: UnixDatagram,
    receiver: UnixDatagram,
}

impl Filter {
    fn new(addresses: &[&str]) -> Self {
        let addresses: Vec<IpNet> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        let mut code = program(MAC, &addresses).unwrap();
        let (sender, receiver) = UnixDatagram::pair().unwrap();
        receiver.set_nonblocking(true).unwrap();
        let attached = libc::sock_fprog { len: code.len().try_into().unwrap(), filter: code.as_mut_ptr() };
        // SAFETY: the kernel reads a `sock_fprog` of its size and the instructions
        // that it points to, both of which live until the call returns.
        let answer = unsafe {
            libc::setsockopt(
                receiver.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const attached).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
        Self { sender, receiver }
    }

    fn accepts(&self, frame: &[u8]) -> bool {
        self.sender.send(frame).unwrap();
        match self.receiver.recv(&mut [0; 4096]) {
            Ok(length) => {
                assert_eq!(length, frame.len());
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        }
    }
}

fn ethernet(mac: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &mac, &ethertype.to_be_bytes(), payload].concat()
}

fn ipv4(source: &str) -> Vec<u8> {
    let source: Ipv4Addr = source.parse().unwrap();
    let header = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    ethernet(MAC, 0x0800, &[&header[..], &source.octets(), &[10, 77, 0, 1], &[0; 8]].concat())
}

fn arp(operation: u8, mac: [u8; 6], sender: &str, target: &str) -> Vec<u8> {
    let [sender, target] = [sender, target].map(|ip| ip.parse::<Ipv4Addr>().unwrap().octets());
    let payload = [&[0, 1, 8, 0, 6, 4, 0, operation], &mac[..], &sender, &[0; 6], &target].concat();
    ethernet(MAC, 0x0806, &payload)
}

/// An IPv6 packet with extension headers, each as its type and its bytes from
/// the second on.
fn ipv6(source: &str, extensions: &[(u8, &[u8])], content: u8, payload: &[u8]) -> Vec<u8> {
    let source: Ipv6Addr = source.parse().unwrap();
    let mut types: Vec<u8> = extensions.iter().map(|(kind, _)| *kind).collect();
    types.push(content);
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, types[0], 255];
    packet.extend(source.octets());
    packet.extend("ff02::1".parse::<Ipv6Addr>().unwrap().octets());
    for ((_, bytes), next) in extensions.iter().zip(&types[1..]) {
        packet.push(*next);
        packet.extend(*bytes);
    }
    packet.extend(payload);
    ethernet(MAC, 0x86dd, &packet)
}

/// An ICMPv6 message about an address.
fn about(kind: u8, target: &str) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    [&[kind, 0, 0, 0, 0, 0, 0, 0], &target.octets()[..]].concat()
}

const PAD: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
const FIRST_FRAGMENT: &[u8] = &[0, 0, 1, 0, 0, 0, 1];
const LATER_FRAGMENT: &[u8] = &[0, 0, 0x41, 0, 0, 0, 1];

#[test]
fn ipv4_leaves_from_own_addresses_alone() {
    let filter = Filter::new(&["10.77.0.5/24", "10.99.0.5/32", "fd77::5/64"]);
    assert!(filter.accepts(&ipv4("10.77.0.5")) && filter.accepts(&ipv4("10.99.0.5")));
    for source in ["10.77.0.6", "10.77.0.1", "0.0.0.0", "255.255.255.255", "5.0.77.10"] {
        assert!(!filter.accepts(&ipv4(source)), "{source}");
    }
    assert!(!Filter::new(&["fd77::5/64"]).accepts(&ipv4("10.77.0.5")));
}

#[test]
fn other_macs_and_protocols_stay() {
    let filter = Filter::new(&["10.77.0.5/24"]);
    let mut frame = ipv4("10.77.0.5");
    frame[11] ^= 1;
    assert!(!filter.accepts(&frame));
    let packet = &ipv4("10.77.0.5")[14..];
    // VLAN, provider's VLAN, MPLS, RARP, 802.1X, a length as 802.2 has it, LLDP.
    for ethertype in [0x8100, 0x88a8, 0x8847, 0x8035, 0x888e, 0x0026, 0x88cc] {
        assert!(!filter.accepts(&ethernet(MAC, ethertype, packet)), "{ethertype:x}");
    }
    for length in 1..30 {
        assert!(!filter.accepts(&ipv4("10.77.0.5")[..length]), "{length} bytes");
    }
}

#[test]
fn arp_speaks_for_own_addresses_alone() {
    let filter = Filter::new(&["10.77.0.5/24"]);
    // A request, an answer, an announcement, a probe.
    assert!(filter.accepts(&arp(1, MAC, "10.77.0.5", "10.77.0.1")));
    assert!(filter.accepts(&arp(2, MAC, "10.77.0.5", "10.77.0.1")));
    assert!(filter.accepts(&arp(1, MAC, "10.77.0.5", "10.77.0.5")));
    assert!(filter.accepts(&arp(1, MAC, "0.0.0.0", "10.77.0.5")));
    // The gateway's answer; an own one with another MAC; a probe that claims another's address.
    assert!(!filter.accepts(&arp(2, MAC, "10.77.0.1", "10.77.0.9")));
    assert!(!filter.accepts(&arp(2, OTHER_MAC, "10.77.0.5", "10.77.0.9")));
    assert!(!filter.accepts(&arp(1, MAC, "0.0.0.0", "10.77.0.6")));
    let mut token_ring = arp(1, MAC, "10.77.0.5", "10.77.0.1");
    token_ring[15] = 6;
    assert!(!filter.accepts(&token_ring));
    assert!(!filter.accepts(&arp(1, MAC, "10.77.0.5", "10.77.0.1")[..30]));
}

#[test]
fn ipv6_leaves_from_own_addresses_and_those_of_the_mac() {
    let filter = Filter::new(&["10.77.0.5/24", "fd77::5/64", "fd99::5/128"]);
    let made = "fd77::858:aff:fe4d:5";
    for source in ["fd77::5", "fd99::5", LINK_LOCAL, made] {
        assert!(filter.accepts(&ipv6(source, &[], 17, &[0; 8])), "{source}");
        assert!(filter.accepts(&ipv6(source, &[(60, PAD), (44, LATER_FRAGMENT)], 17, &[0; 8])), "{source}");
    }
    for source in ["fd77::6", "fe80::1", "::", "fd99::858:aff:fe4d:5", "2001:db8::858:aff:fe4d:5"] {
        assert!(!filter.accepts(&ipv6(source, &[], 17, &[0; 8])), "{source}");
        assert!(!filter.accepts(&ipv6(source, &[(44, LATER_FRAGMENT)], 58, &[0; 8])), "{source}");
    }
    // With addresses that come from a router alone.
    let filter = Filter::new(&["10.77.0.5/24"]);
    assert!(filter.accepts(&ipv6("2001:db8::858:aff:fe4d:5", &[], 6, &[0; 20])));
    assert!(!filter.accepts(&ipv6("2001:db8::5", &[], 6, &[0; 20])));
}

#[test]
fn neighbour_discovery_is_about_own_addresses() {
    let filter = Filter::new(&["fd77::5/64"]);
    let accepts = |source: &str, message: &[u8]| filter.accepts(&ipv6(source, &[], 58, message));
    // Advertisements, solicitations, and detection of duplicates.
    for own in ["fd77::5", LINK_LOCAL] {
        assert!(accepts("fd77::5", &about(136, own)), "{own}");
        assert!(accepts("::", &about(135, own)), "{own}");
    }
    assert!(accepts("fd77::5", &about(135, "fd77::1")));
    for other in ["fd77::1", "fe80::1"] {
        assert!(!accepts("fd77::5", &about(136, other)), "{other}");
        assert!(!accepts("::", &about(135, other)), "{other}");
    }
    assert!(!accepts("fe80::1", &about(136, "fd77::5")) && !accepts("fe80::1", &about(135, "fd77::1")));
    // A router's advertisement and redirect, whoever sends them; a host's solicitation.
    for source in [LINK_LOCAL, "fd77::5", "fe80::1"] {
        assert!(!accepts(source, &about(134, "::")) && !accepts(source, &about(137, "fd77::1")), "{source}");
    }
    assert!(accepts(LINK_LOCAL, &[133, 0, 0, 0, 0, 0, 0, 0]));
    assert!(accepts("fd77::5", &[128, 0, 0, 0, 0, 0, 0, 0]));
    // Reports of multicast listeners, before there is an address, too.
    let listener: &[(u8, &[u8])] = &[(0, &[0, 5, 2, 0, 0, 1, 0])];
    for source in ["::", LINK_LOCAL] {
        assert!(filter.accepts(&ipv6(source, listener, 58, &about(143, "::"))), "{source}");
    }
    assert!(!filter.accepts(&ipv6("fe80::1", listener, 58, &about(143, "::"))));
    assert!(!accepts("::", &about(128, "::")));
}

#[test]
fn neighbour_discovery_does_not_hide_behind_other_headers() {
    let filter = Filter::new(&["fd77::5/64"]);
    let (own, other) = (about(136, "fd77::5"), about(136, "fd77::1"));
    let advertisement = about(134, "::");
    let chains: [&[(u8, &[u8])]; 6] = [
        &[(0, PAD)],
        &[(60, PAD), (43, PAD)],
        &[(44, FIRST_FRAGMENT)],
        &[(0, PAD), (44, FIRST_FRAGMENT), (60, PAD)],
        &[(60, &[1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])],
        &[(60, PAD); MAX_EXTENSIONS],
    ];
    for chain in chains {
        assert!(filter.accepts(&ipv6("fd77::5", chain, 58, &own)), "{chain:?}");
        assert!(!filter.accepts(&ipv6("fd77::5", chain, 58, &other)), "{chain:?}");
        assert!(!filter.accepts(&ipv6("fd77::5", chain, 58, &advertisement)), "{chain:?}");
        assert!(filter.accepts(&ipv6("fd77::5", chain, 17, &[0; 8])), "{chain:?}");
    }
    let long = [(60, PAD); MAX_EXTENSIONS + 1];
    assert!(!filter.accepts(&ipv6("fd77::5", &long, 58, &own)));
    // A header that says that it is longer than the packet.
    assert!(!filter.accepts(&ipv6("fd77::5", &[(60, &[255, 0, 0, 0, 0, 0, 0])], 58, &other)));
}

#[test]
fn an_interface_without_addresses_is_held_to_its_mac() {
    let filter = Filter::new(&[]);
    assert!(filter.accepts(&ipv4("10.1.2.3")) && filter.accepts(&arp(1, MAC, "10.1.2.3", "10.1.2.4")));
    assert!(filter.accepts(&ipv6("fd00::7", &[], 58, &about(136, "fd00::7"))));
    assert!(!filter.accepts(&arp(2, OTHER_MAC, "10.1.2.3", "10.1.2.4")));
    assert!(!filter.accepts(&ipv6("fd00::7", &[], 58, &about(134, "::"))));
    let mut frame = ipv4("10.1.2.3");
    frame[6] ^= 2;
    assert!(!filter.accepts(&frame));
}

#[test]
fn more_addresses_than_there_is_room_for_are_refused_in_words() {
    let addresses = |count: u16| -> Vec<IpNet> {
        (0..count).map(|n| IpNet::from(IpAddr::from(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, n)))).collect()
    };
    program(MAC, &addresses(64)).unwrap();
    let error = program(MAC, &addresses(300)).unwrap_err().to_string();
    assert!(error.contains("300 addresses") && error.contains("network_filter"), "{error}");
}

proptest! {
    /// Whatever else a frame says, it leaves with a sender of the pod's or not at all.
    #[test]
    fn what_leaves_bears_the_pods_sender(
        own_mac in prop::bool::weighted(0.9),
        ethertype in prop::sample::select(vec![0x0800u16, 0x0806, 0x86dd, 0x8100, 0x1234]),
        payload in prop::collection::vec(prop::sample::select(vec![0u8, 1, 5, 6, 10, 44, 58, 60, 77, 136, 255]), 0..120),
        source in prop::option::of(Just(())),
    ) {
        let filter = Filter::new(&["10.77.0.5/24", "fd77::5/64"]);
        let mut payload = payload;
        if source.is_some() && payload.len() >= 24 {
            let own: Ipv6Addr = "fd77::5".parse().unwrap();
            match ethertype {
                0x0800 => payload[12..16].copy_from_slice(&[10, 77, 0, 5]),
                0x86dd => payload[8..24].copy_from_slice(&own.octets()),
                _ => {}
            }
        }
        let frame = ethernet(if own_mac { MAC } else { OTHER_MAC }, ethertype, &payload);
        if filter.accepts(&frame) {
            prop_assert!(own_mac);
            match ethertype {
                0x0800 => prop_assert_eq!(&payload[12..16], &[10, 77, 0, 5]),
                0x0806 => prop_assert_eq!(&payload[8..14], &MAC),
                0x86dd => {
                    let source = Ipv6Addr::from(<[u8; 16]>::try_from(&payload[8..24]).unwrap());
                    let made = ["fd77::5", LINK_LOCAL, "fd77::858:aff:fe4d:5", "::"];
                    prop_assert!(made.iter().any(|ip| source == ip.parse::<Ipv6Addr>().unwrap()));
                }
                _ => prop_assert!(false, "ethertype {:x}", ethertype),
            }
        } else if own_mac && source.is_some() && ethertype == 0x0800 && payload.len() >= 24 {
            prop_assert!(false, "an own packet was rejected");
        }
    }
}
