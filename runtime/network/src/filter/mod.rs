//! The filter of a guest's frames: those leave its tap whose sender is the pod.
//!
//! The guest's frames never pass the netfilter hooks of the pod's namespace,
//! because tc takes them before. So tc itself looks at them, with a classic
//! BPF program ([`program`]) that the kernel runs for each frame. A frame that
//! the program accepts is redirected to the network, any other is dropped: also
//! one that is cut short, because a load beyond a frame's end rejects it.
//!
//! | a frame of | leaves when |
//! | --- | --- |
//! | any kind | its source is the interface's MAC, and it has no VLAN tag |
//! | IPv4 | its source is one of the interface's addresses |
//! | ARP | MAC and address of the sender are the interface's; a probe has no sender and asks for an own address (RFC 5227) |
//! | IPv6 | its source is one of the interface's addresses, or one that the kernel makes of its MAC (RFC 4291, appendix A) |
//! | IPv6 without a source | it solicits an own address (RFC 4862, §5.4) or is a multicast listener's report |
//! | neighbour advertisements | the address that they advertise is an own one |
//! | router advertisements, redirects | never |
//! | other protocols | never |
//!
//! The program follows up to [`MAX_EXTENSIONS`] IPv6 extension headers, behind
//! which neighbour discovery could hide.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use libc::sock_filter;

mod assembler;
#[cfg(test)]
mod tests;

use assembler::{Assembler, At, Label, Size};

/// The answer to a frame that may leave.
const ACCEPT: u32 = u32::MAX;
/// The answer to a frame that is dropped.
const REJECT: u32 = 0;

/// IPv6 extension headers that are followed; frames with more are rejected.
const MAX_EXTENSIONS: usize = 6;

const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_ARP: u32 = 0x0806;
const ETHERTYPE_IPV6: u32 = 0x86dd;

/// IPv6 headers that say what follows them and, in units of eight bytes, how
/// long they are: hop-by-hop options, routing, destination options, mobility.
const OPTIONS: [u32; 4] = [0, 43, 60, 135];
const FRAGMENT: u32 = 44;
const ICMPV6: u32 = 58;

/// Types of ICMPv6.
const ROUTER_ADVERTISEMENT: u32 = 134;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const REDIRECT: u32 = 137;
/// Reports of multicast listeners: version 1, its "done", and version 2.
const LISTENER_REPORTS: [u32; 3] = [131, 132, 143];

/// More addresses than a program has room for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{addresses} addresses on one interface are too many to filter by: give the pod fewer, or set \
     network_filter = false for its handler"
)]
pub struct TooManyAddresses {
    addresses: usize,
}

/// The program for an interface with these addresses.
///
/// An interface without any address is one that the pod configures by itself:
/// it is held to its MAC alone.
///
/// # Errors
/// [`TooManyAddresses`].
pub fn program(mac: [u8; 6], addresses: &[IpNet]) -> Result<Vec<sock_filter>, TooManyAddresses> {
    let sender = Sender::new(mac, addresses);
    let mut code = Assembler::default();
    let labels = Labels { accept: code.label(), reject: code.label() };
    sender.frame(&mut code, labels);
    code.place(labels.accept);
    code.answer(ACCEPT);
    code.place(labels.reject);
    code.answer(REJECT);
    let program = code.finish();
    if program.len() > assembler::MAX_LENGTH {
        return Err(TooManyAddresses { addresses: addresses.len() });
    }
    Ok(program)
}

/// The two ends of a program.
#[derive(Clone, Copy)]
struct Labels {
    accept: Label,
    reject: Label,
}

/// An IPv6 address, or all that agree with it in the bits of a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pattern {
    value: u128,
    mask: u128,
}

/// The senders that frames of an interface may bear.
#[derive(Debug)]
struct Sender {
    mac_start: u32,
    mac_end: u32,
    /// Any address will do.
    any: bool,
    v4: Vec<Ipv4Addr>,
    v6: Vec<Pattern>,
}

/// The low half of an IPv6 address.
const INTERFACE_ID: u128 = u64::MAX as u128;

impl Sender {
    fn new(mac: [u8; 6], addresses: &[IpNet]) -> Self {
        let [a, b, c, d, e, f] = mac;
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        let made = u128::from(u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]));
        let mut prefixes = vec![Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).to_bits()];
        for address in addresses {
            match address.addr() {
                IpAddr::V4(ip) => v4.push(ip),
                IpAddr::V6(ip) => {
                    v6.push(Pattern { value: ip.to_bits(), mask: u128::MAX });
                    if address.prefix_len() <= 64 {
                        prefixes.push(ip.to_bits() & !INTERFACE_ID);
                    }
                }
            }
        }
        if v6.is_empty() {
            // The pod has no IPv6 addresses but those that a router of the network advertises.
            v6.push(Pattern { value: made, mask: INTERFACE_ID });
        } else {
            prefixes.sort_unstable();
            prefixes.dedup();
            v6.extend(prefixes.iter().map(|prefix| Pattern { value: prefix | made, mask: u128::MAX }));
        }
        Self {
            mac_start: u32::from_be_bytes([a, b, c, d]),
            mac_end: u32::from(u16::from_be_bytes([e, f])),
            any: addresses.is_empty(),
            v4,
            v6,
        }
    }

    /// Looks at the Ethernet header.
    fn frame(&self, code: &mut Assembler, labels: Labels) {
        let (arp, v6) = (code.label(), code.label());
        code.load(Size::Word, At::Start(assembler::VLAN_TAG_PRESENT));
        code.jump_unless(0, labels.reject);
        self.mac(code, 6, labels);
        code.load(Size::Half, At::Start(12));
        code.jump_if(ETHERTYPE_ARP, arp);
        code.jump_if(ETHERTYPE_IPV6, v6);
        code.jump_unless(ETHERTYPE_IPV4, labels.reject);
        self.ipv4(code, 26, labels.accept);
        code.jump(labels.reject);
        code.place(arp);
        self.arp(code, labels);
        code.place(v6);
        self.ipv6(code, labels);
    }

    /// Rejects another MAC at `offset`.
    fn mac(&self, code: &mut Assembler, offset: u32, labels: Labels) {
        code.load(Size::Word, At::Start(offset));
        code.jump_unless(self.mac_start, labels.reject);
        code.load(Size::Half, At::Start(offset.saturating_add(4)));
        code.jump_unless(self.mac_end, labels.reject);
    }

    /// Goes to `own` if the IPv4 address at `offset` is the interface's, which
    /// stays in the accumulator if not.
    fn ipv4(&self, code: &mut Assembler, offset: u32, own: Label) {
        if self.any {
            return code.jump(own);
        }
        code.load(Size::Word, At::Start(offset));
        for address in &self.v4 {
            code.jump_if(address.to_bits(), own);
        }
    }

    /// Looks at a request or an answer of RFC 826.
    fn arp(&self, code: &mut Assembler, labels: Labels) {
        // Ethernet and IPv4, and the lengths of their addresses.
        code.load(Size::Word, At::Start(14));
        code.jump_unless(0x0001_0800, labels.reject);
        code.load(Size::Half, At::Start(18));
        code.jump_unless(0x0604, labels.reject);
        self.mac(code, 22, labels);
        self.ipv4(code, 28, labels.accept);
        code.jump_unless(0, labels.reject);
        self.ipv4(code, 38, labels.accept);
        code.jump(labels.reject);
    }

    fn ipv6(&self, code: &mut Assembler, labels: Labels) {
        let (source, advertised, solicited, reported) =
            (code.label(), code.label(), code.label(), code.label());
        follow_extensions(code, source, labels.reject);
        code.jump_unless(ICMPV6, source);
        code.load(Size::Byte, At::Index(0));
        code.jump_if(ROUTER_ADVERTISEMENT, labels.reject);
        code.jump_if(REDIRECT, labels.reject);
        code.jump_if(NEIGHBOUR_ADVERTISEMENT, advertised);
        code.jump_if(NEIGHBOUR_SOLICITATION, solicited);
        for report in LISTENER_REPORTS {
            code.jump_if(report, reported);
        }
        code.jump(source);
        code.place(advertised);
        self.ipv6_address(code, At::Index(8), source);
        code.jump(labels.reject);
        code.place(solicited);
        let unspecified = code.label();
        source_is_unspecified(code, unspecified);
        code.jump(source);
        code.place(unspecified);
        self.ipv6_address(code, At::Index(8), labels.accept);
        code.jump(labels.reject);
        code.place(reported);
        source_is_unspecified(code, labels.accept);
        code.place(source);
        self.ipv6_address(code, At::Start(22), labels.accept);
        code.jump(labels.reject);
    }

    /// Goes to `own` if the IPv6 address there is the interface's.
    fn ipv6_address(&self, code: &mut Assembler, at: At, own: Label) {
        if self.any {
            return code.jump(own);
        }
        for pattern in &self.v6 {
            let other = code.label();
            for (place, word) in (0u32..4).enumerate() {
                let shift = 96u32.saturating_sub(32 * word);
                let (value, mask) = ((pattern.value >> shift) as u32, (pattern.mask >> shift) as u32);
                if mask == 0 {
                    continue;
                }
                let offset = 4 * u32::try_from(place).unwrap_or_default();
                code.load(
                    Size::Word,
                    match at {
                        At::Start(start) => At::Start(start.saturating_add(offset)),
                        At::Index(start) => At::Index(start.saturating_add(offset)),
                    },
                );
                code.jump_unless(value, other);
            }
            code.jump(own);
            code.place(other);
        }
    }
}

/// Goes to `unspecified` if the packet's source is `::`.
fn source_is_unspecified(code: &mut Assembler, unspecified: Label) {
    let specified = code.label();
    for offset in [22, 26, 30, 34] {
        code.load(Size::Word, At::Start(offset));
        code.jump_unless(0, specified);
    }
    code.jump(unspecified);
    code.place(specified);
}

/// Leaves the type of a packet's content in the accumulator, and its place in
/// the index register. Goes to `later_fragment` if the content began in an
/// earlier packet, and to `too_many` behind [`MAX_EXTENSIONS`] headers.
fn follow_extensions(code: &mut Assembler, later_fragment: Label, too_many: Label) {
    let content = code.label();
    code.set_index(54);
    code.load(Size::Byte, At::Start(20));
    for _ in 0..MAX_EXTENSIONS {
        let (options, fragment, next) = (code.label(), code.label(), code.label());
        for kind in OPTIONS {
            code.jump_if(kind, options);
        }
        code.jump_if(FRAGMENT, fragment);
        code.jump(content);
        code.place(fragment);
        code.load(Size::Half, At::Index(2));
        code.and(0xfff8);
        code.jump_unless(0, later_fragment);
        code.load_index();
        code.add(8);
        code.jump(next);
        code.place(options);
        code.load(Size::Byte, At::Index(1));
        code.add(1);
        code.shift_left(3);
        code.add_index();
        code.place(next);
        code.store();
        code.load(Size::Byte, At::Index(0));
        code.set_index_from_store();
    }
    for kind in OPTIONS {
        code.jump_if(kind, too_many);
    }
    code.jump_if(FRAGMENT, too_many);
    code.place(content);
}
