//! The configuration of the host's resolver (resolv.conf(5)), for pods that get
//! none from the client or the network.

use std::net::IpAddr;
use std::path::Path;

use super::attachment::Dns;
use husk_base::{blocking, text_file};

const PATH: &str = "/etc/resolv.conf";

/// Largest file that is read, bytes.
const MOST: u64 = 64 << 10;

/// The host's, without servers that only the host itself reaches.
pub async fn of_host() -> Dns {
    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    let text = blocking(|| text_file::read(Path::new(PATH), MOST)).await;
    match text {
        Ok(text) => parse(&text),
        Err(error) => {
            tracing::debug!(%error, "failed to read {PATH}");
            Dns::default()
        }
    }
}

pub(super) fn parse(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.servers.extend(words.next().filter(|server| is_reachable(server))),
            // The last one counts, and options add up.
            Some("search" | "domain") => dns.searches = words.collect(),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

/// An address that means the same in a pod.
fn is_reachable(server: &str) -> bool {
    server.parse::<IpAddr>().is_ok_and(|address| {
        let link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        !address.is_loopback() && !address.is_unspecified() && !link_local
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_servers_are_left_out() {
        let text = "# made by hand\nnameserver 127.0.0.53\nnameserver 10.0.0.2\nnameserver fd00::2\nnameserver ::1\n\
                    nameserver fe80::1%eth0\nnameserver\nnameserver dns.example\ndomain old.example\n\
                    search a.example b.example\noptions ndots:2 edns0\noptions trust-ad\n; the end";
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let dns = parse(text);
        assert_eq!(dns.servers, words(&["10.0.0.2", "fd00::2"]));
        assert_eq!(dns.searches, words(&["a.example", "b.example"]));
        assert_eq!(dns.options, words(&["ndots:2", "edns0", "trust-ad"]));
        assert_eq!(parse("\0\u{7f}"), Dns::default());
    }
}
