//! Checks the servers that a registry sends huskd to: for a token, or for content that is
//! elsewhere.
//!
//! The author of an image's name chooses the registry, and a registry's answers name other
//! servers. huskd asks from the host's own network, where a cloud's metadata service and
//! local services trust every client that reaches them. So a registry may send huskd only
//! to addresses that are no more private than its own, never from TLS to plain HTTP, and
//! the password goes only to hosts of the registry's own domain. `trusted_hosts` in the
//! configuration names exceptions.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use husk_base::lock;
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// The variables that name proxies.
const PROXY_VARIABLES: [&str; 6] =
    ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];

/// The range from which an address can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reach {
    /// The address can be reached from anywhere.
    Public,
    /// The address can be reached within a site (RFC 1918, RFC 6598, RFC 4193).
    Private,
    /// The address can be reached from this machine: loopback, link-local, and the
    /// metadata services of clouds.
    Local,
}

impl Reach {
    /// The reach of one address.
    pub(super) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => match embedded(address) {
                Some(address) => Self::of_v4(address),
                None => Self::of_v6(address),
            },
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        match address.octets() {
            // The last pattern is Alibaba's metadata service.
            [0 | 127 | 224..=255, ..] | [169, 254, ..] | [100, 100, 100, 200] => Self::Local,
            [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] | [198, 18 | 19, ..] => {
                Self::Private
            }
            _ => Self::Public,
        }
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        match address.segments() {
            [0, 0, 0, 0, 0, 0, 0, 0 | 1] | [0xfe80..=0xfebf, ..] | [0xff00..=0xffff, ..] => Self::Local,
            // This is Amazon's metadata service.
            [0xfd00, 0x0ec2, ..] => Self::Local,
            [0xfc00..=0xfdff, ..] | [0xfec0..=0xfeff, ..] => Self::Private,
            _ => Self::Public,
        }
    }
}

/// The IPv4 address that an IPv6 address stands for: mapped, translated (RFC 6052) or
/// tunnelled (RFC 3056).
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let two = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(two(high, low)),
        [0x2002, high, low, ..] => Some(two(high, low)),
        _ => None,
    }
}

/// The rules for the servers that one registry may send huskd to.
#[derive(Debug)]
pub(super) struct Referrals {
    registry: Url,
    /// Hosts that the administrator trusts.
    trusted: Vec<String>,
    /// The most public address from which the registry has answered. A name that
    /// resolves to another address each time gains nothing.
    reach: Mutex<Option<Reach>>,
    proxies: Vec<Url>,
}

impl Referrals {
    pub(super) fn new(registry: Url, trusted: &[String]) -> Self {
        let proxies = PROXY_VARIABLES.iter().filter_map(|name| std::env::var(name).ok());
        let proxies = proxies.filter_map(|text| proxy(&text)).collect();
        Self { registry, trusted: trusted.to_vec(), reach: Mutex::default(), proxies }
    }

    /// Whether a URL is one of the registry itself.
    pub(super) fn is_own(&self, url: &Url) -> bool {
        self.registry.origin() == url.origin()
    }

    /// Notes the address from which the registry has answered.
    pub(super) async fn answered(&self, from: Option<SocketAddr>) {
        let reach = match from {
            // A proxy's address says nothing about the registry's.
            Some(address) if !self.is_proxy(address).await => Reach::of(address.ip()),
            _ => Reach::Public,
        };
        let mut known = lock(&self.reach);
        *known = Some(known.map_or(reach, |known| known.min(reach)));
    }

    fn reach(&self) -> Reach {
        lock(&self.reach).unwrap_or(Reach::Public)
    }

    /// Checks a URL that the registry sends huskd to, as far as the URL itself shows. The
    /// addresses of a name are checked when it is resolved.
    pub(super) fn check(&self, url: &Url) -> Result<(), String> {
        let shown = shown(url);
        match (self.registry.scheme(), url.scheme()) {
            (_, "https") | ("http", "http") => {}
            (_, "http") => {
                return Err(format!(
                    "the registry sends huskd to `{shown}`, which is not https, as it is itself"
                ));
            }
            _ => return Err(format!("the registry sends huskd to `{shown}`, which is not http or https")),
        }
        let host = url.host_str().unwrap_or_default();
        if self.is_trusted(host) || self.is_own(url) {
            return Ok(());
        }
        if self.proxies.iter().any(|proxy| proxy.host_str() == Some(host)) {
            return Err(format!("the registry sends huskd to its proxy, `{shown}`"));
        }
        let literal = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        match literal {
            Ok(address) => self.permits(&shown, address),
            Err(_) => Ok(()),
        }
    }

    fn permits(&self, shown: &str, address: IpAddr) -> Result<(), String> {
        if Reach::of(address) <= self.reach() {
            return Ok(());
        }
        Err(format!(
            "the registry sends huskd to `{shown}` at {address}, a more private address than its own; if \
             that is right, name the host under `trusted_hosts` of [images]"
        ))
    }

    /// Whether a token's realm may have the password for the registry.
    pub(super) fn may_know_password(&self, realm: &Url) -> bool {
        let (Some(registry), Some(realm)) = (self.registry.host_str(), realm.host_str()) else {
            return false;
        };
        registry == realm || is_sibling(registry, realm) || self.is_trusted(realm)
    }

    fn is_trusted(&self, host: &str) -> bool {
        self.trusted.iter().any(|trusted| trusted.eq_ignore_ascii_case(host))
    }

    async fn is_proxy(&self, address: SocketAddr) -> bool {
        for proxy in &self.proxies {
            let port = proxy.port_or_known_default().unwrap_or_default();
            let host = proxy.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
            if let Ok(mut found) = tokio::net::lookup_host((host, port)).await
                && found.any(|one| one == address)
            {
                return true;
            }
        }
        false
    }
}

/// A URL without its query, which may be a secret key to the content.
fn shown(url: &Url) -> String {
    format!("{}{}", url.origin().ascii_serialization(), url.path()).chars().take(200).collect()
}

fn proxy(text: &str) -> Option<Url> {
    let url = if text.contains("://") { Url::parse(text) } else { Url::parse(&format!("http://{text}")) };
    url.ok().filter(Url::has_host)
}

/// Whether two hosts are below one domain with one owner: "registry.gitlab.com" and
/// "gitlab.com", but not "a.co.uk" and "b.co.uk".
fn is_sibling(registry: &str, realm: &str) -> bool {
    let is_name = |host: &str| host.contains('.') && host.parse::<IpAddr>().is_err() && !host.contains(':');
    let Some((_, domain)) = registry.split_once('.').filter(|_| is_name(registry) && is_name(realm)) else {
        return false;
    };
    let labels: Vec<&str> = domain.split('.').collect();
    let shared_by_many = match labels.as_slice() {
        [] | [_] => true,
        [second, top] => top.len() == 2 && second.len() <= 3,
        _ => false,
    };
    !shared_by_many && (realm == domain || realm.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')))
}

/// Resolves the names that a registry sends huskd to, and drops the addresses that are
/// not allowed.
pub(super) struct Resolver(pub(super) Arc<Referrals>);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let referrals = self.0.clone();
        Box::pin(async move {
            let name = name.as_str();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name, 0)).await?.collect();
            let is_proxy = referrals.proxies.iter().any(|proxy| proxy.host_str() == Some(name));
            if is_proxy || referrals.is_trusted(name) {
                return Ok(Box::new(found.into_iter()) as Addrs);
            }
            let mut refusal = format!("{name} has no address");
            let mut permitted = Vec::with_capacity(found.len());
            for address in found {
                match referrals.permits(name, address.ip()) {
                    Ok(()) => permitted.push(address),
                    Err(why) => refusal = why,
                }
            }
            if permitted.is_empty() {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, refusal).into());
            }
            Ok(Box::new(permitted.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn referrals(registry: &str, from: &str) -> Referrals {
        let referrals = Referrals::new(Url::parse(registry).unwrap(), &["trusted.example".to_owned()]);
        *lock(&referrals.reach) = Some(Reach::of(from.parse().unwrap()));
        Referrals { proxies: Vec::new(), ..referrals }
    }

    fn check(registry: &str, from: &str, to: &str) -> Result<(), String> {
        referrals(registry, from).check(&Url::parse(to).unwrap())
    }

    #[test]
    fn addresses_have_a_reach() {
        for (address, want) in [
            ("1.1.1.1", Reach::Public),
            ("172.32.0.1", Reach::Public),
            ("2606:4700::1", Reach::Public),
            ("10.0.0.1", Reach::Private),
            ("172.31.255.1", Reach::Private),
            ("100.64.0.1", Reach::Private),
            ("fd12::1", Reach::Private),
            ("::ffff:192.168.0.1", Reach::Private),
            ("64:ff9b::a00:1", Reach::Private),
            ("127.8.8.8", Reach::Local),
            ("0.0.0.0", Reach::Local),
            ("169.254.169.254", Reach::Local),
            ("100.100.100.200", Reach::Local),
            ("::1", Reach::Local),
            ("::", Reach::Local),
            ("::ffff:127.0.0.1", Reach::Local),
            ("2002:7f00:1::", Reach::Local),
            ("fe80::1", Reach::Local),
            ("fd00:ec2::254", Reach::Local),
        ] {
            assert_eq!(Reach::of(address.parse().unwrap()), want, "{address}");
        }
    }

    #[test]
    fn a_registry_sends_nobody_to_more_private_places() {
        let https = "https://registry.example";
        for (from, to, want) in [
            ("1.1.1.1", "https://1.2.3.4/token", true),
            ("1.1.1.1", "https://10.0.0.1/token", false),
            ("1.1.1.1", "https://[::1]/token", false),
            ("1.1.1.1", "https://169.254.169.254/latest/meta-data", false),
            ("10.0.0.1", "https://10.0.0.2/token", true),
            ("10.0.0.1", "https://127.0.0.1/token", false),
            ("10.0.0.1", "https://0x7f000001/token", false),
            ("127.0.0.1", "https://127.0.0.1:5001/token", true),
            ("1.1.1.1", "http://1.2.3.4/token", false),
            ("1.1.1.1", "file:///etc/passwd", false),
            ("1.1.1.1", "https://trusted.example/token", true),
        ] {
            assert_eq!(check(https, from, to).is_ok(), want, "{from} {to}");
        }
        assert!(check("http://registry.example", "1.1.1.1", "http://1.2.3.4/token").is_ok());
    }

    #[tokio::test]
    async fn a_name_that_leads_to_more_private_places_has_no_address() {
        let resolve = async |from: &str| {
            let resolver = Resolver(Arc::new(referrals("https://registry.example", from)));
            resolver.resolve("localhost".parse().unwrap()).await
        };
        let error = resolve("1.1.1.1").await.err().unwrap().to_string();
        assert!(error.contains("localhost") && error.contains("trusted_hosts"), "{error}");
        assert!(resolve("127.0.0.1").await.unwrap().count() > 0);
    }

    #[tokio::test]
    async fn a_registry_that_moves_gains_nothing() {
        let referrals = referrals("https://registry.example", "10.0.0.1");
        referrals.answered(Some(([127, 0, 0, 1], 443).into())).await;
        assert_eq!(referrals.reach(), Reach::Private);
        referrals.answered(Some(([1, 1, 1, 1], 443).into())).await;
        assert_eq!(referrals.reach(), Reach::Public);
    }

    #[test]
    fn passwords_stay_in_the_registrys_own_domain() {
        for (registry, realm, want) in [
            ("https://registry.example", "https://registry.example:8443/token", true),
            ("https://registry-1.docker.io", "https://auth.docker.io/token", true),
            ("https://registry.gitlab.com", "https://gitlab.com/jwt/auth", true),
            ("https://registry.example", "https://other.example/token", false),
            ("https://registry.example.com", "https://example.com.evil.net/token", false),
            ("https://registry.example.com", "https://evilexample.com/token", false),
            ("https://shop.co.uk", "https://evil.co.uk/token", false),
            ("https://10.1.2.3", "https://10.9.2.3/token", false),
            ("https://registry.example", "https://trusted.example/token", true),
        ] {
            let referrals = referrals(registry, "1.1.1.1");
            assert_eq!(referrals.may_know_password(&Url::parse(realm).unwrap()), want, "{registry} {realm}");
        }
    }
}
