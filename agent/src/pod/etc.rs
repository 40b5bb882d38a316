//! The pod's `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf`.

use std::fmt::Write;
use std::net::IpAddr;

use husk_proto::agent::Dns;

/// The beginning of every hosts file.
const LOCALHOST: &str = "127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
ff00::\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
";

/// A text would change the meaning of the file that it is written to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The address of a server is invalid.
    #[error("DNS server {0:?} is not an IP address")]
    Server(String),
    /// A word has white space or control characters.
    #[error("{what} {word:?} must be one word")]
    Word { what: &'static str, word: String },
}

/// The hosts file: localhost, and the pod's own name at each of its addresses.
pub fn hosts(hostname: &str, addresses: &[IpAddr]) -> Result<String, Error> {
    let mut text = LOCALHOST.to_owned();
    if !hostname.is_empty() {
        check_word("host name", hostname)?;
        for address in addresses {
            let _ = writeln!(text, "{address}\t{hostname}");
        }
    }
    Ok(text)
}

/// The resolver's configuration (resolv.conf(5)).
pub fn resolv_conf(dns: &Dns) -> Result<String, Error> {
    let mut text = String::new();
    for server in &dns.servers {
        // An IPv6 address may name its interface: fe80::1%eth0.
        let (address, zone) = server.split_once('%').unwrap_or((server, "eth0"));
        if address.parse::<IpAddr>().is_err() || check_word("zone", zone).is_err() {
            return Err(Error::Server(server.clone()));
        }
        let _ = writeln!(text, "nameserver {server}");
    }
    for (keyword, what, words) in
        [("search", "search domain", &dns.searches), ("options", "DNS option", &dns.options)]
    {
        for word in words {
            check_word(what, word)?;
        }
        if !words.is_empty() {
            let _ = writeln!(text, "{keyword} {}", words.join(" "));
        }
    }
    Ok(text)
}

/// Checks that a word has no white space, which would end it, and no control
/// characters.
pub fn check_word(what: &'static str, word: &str) -> Result<(), Error> {
    if word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(Error::Word { what, word: word.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_file_knows_localhost_and_the_pod() {
        let addresses = ["10.88.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
        let text = hosts("web-0", &addresses).unwrap();
        assert!(text.starts_with("127.0.0.1\tlocalhost\n::1\t"));
        assert!(text.ends_with("10.88.0.5\tweb-0\nfd00::5\tweb-0\n"));
        assert_eq!(hosts("", &addresses).unwrap(), LOCALHOST);
    }

    #[test]
    fn the_resolver_gets_what_the_pod_asked_for() {
        let dns = Dns {
            servers: vec!["10.96.0.10".into(), "fd00::10".into(), "fe80::1%eth0".into()],
            searches: vec!["default.svc.cluster.local".into(), "cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns).unwrap(),
            "nameserver 10.96.0.10\nnameserver fd00::10\nnameserver fe80::1%eth0\n\
             search default.svc.cluster.local cluster.local\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&Dns::default()).unwrap(), "");
    }

    #[test]
    fn nothing_slips_in_another_line() {
        for server in ["dns.example", "1.1.1.1\nsearch x", "fe80::1%a b", ""] {
            assert!(
                resolv_conf(&Dns { servers: vec![server.into()], ..Dns::default() }).is_err(),
                "{server}"
            );
        }
        for word in ["a b", "a\nnameserver 6.6.6.6", ""] {
            assert!(resolv_conf(&Dns { searches: vec![word.into()], ..Dns::default() }).is_err());
            assert!(resolv_conf(&Dns { options: vec![word.into()], ..Dns::default() }).is_err());
        }
        assert!(hosts("a\n6.6.6.6 bank", &[]).is_err());
    }
}
