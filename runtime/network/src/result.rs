//! Answers of CNI plugins to ADD, in every version of the format.
//!
//! 0.1.0 and 0.2.0 have `ip4` and `ip6`; from 0.3.0 on there are lists of
//! `interfaces`, `ips` and `routes`. 1.0.0 dropped `version` from `ips`, and
//! 1.1.0 added fields that nothing here depends on. The shape tells which it
//! is, because plugins are not always true to the version they were asked for.
//! See the CNI specification, section 5.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::attachment::Dns;

/// The part of a result that matters for a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodResult {
    /// The pod's addresses, the first is its main one.
    pub addresses: Vec<IpNet>,
    /// Routes: destination and gateway.
    pub routes: Vec<(IpNet, Option<IpAddr>)>,
    /// Name service.
    pub dns: Dns,
}

/// Reads an address with the length of its network's prefix.
fn address(text: &str) -> Result<IpNet, String> {
    text.parse().map_err(|_| format!("{text:?} is not an address with a prefix length"))
}

/// Every field of every version; a list that is `null` is an empty one, as
/// plugins written in Go print it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    interfaces: Option<Vec<RawInterface>>,
    ips: Option<Vec<RawIp>>,
    routes: Option<Vec<RawRoute>>,
    dns: Option<RawDns>,
    ip4: Option<RawOld>,
    ip6: Option<RawOld>,
}

#[derive(Deserialize)]
struct RawInterface {
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct RawIp {
    address: String,
    interface: Option<usize>,
}

#[derive(Deserialize)]
struct RawRoute {
    dst: String,
    gw: Option<String>,
}

#[derive(Deserialize)]
struct RawOld {
    ip: String,
    routes: Option<Vec<RawRoute>>,
}

#[derive(Deserialize)]
struct RawDns {
    nameservers: Option<Vec<String>>,
    domain: Option<String>,
    search: Option<Vec<String>>,
    options: Option<Vec<String>>,
}

/// Reads a result. The error is the reason in words.
///
/// # Errors
/// When it is not a result, or has addresses that are none.
pub fn parse(result: &Value) -> Result<PodResult, String> {
    let raw = Raw::deserialize(result).map_err(|error| error.to_string())?;
    let mut pod = PodResult::default();
    let interfaces = raw.interfaces.unwrap_or_default();
    for ip in raw.ips.unwrap_or_default() {
        let in_pod = match ip.interface {
            None => true,
            Some(place) => interfaces
                .get(place)
                .ok_or_else(|| {
                    format!("address {} is of interface {place}, which is not listed", ip.address)
                })?
                .sandbox
                .as_ref()
                .is_some_and(|sandbox| !sandbox.is_empty()),
        };
        if in_pod {
            pod.addresses.push(address(&ip.address)?);
        }
    }
    let mut routes = raw.routes.unwrap_or_default();
    for old in [raw.ip4, raw.ip6].into_iter().flatten() {
        pod.addresses.push(address(&old.ip)?);
        routes.extend(old.routes.unwrap_or_default());
    }
    for route in routes {
        let gateway = match route.gw.filter(|gateway| !gateway.is_empty()) {
            None => None,
            Some(gateway) => {
                Some(gateway.parse().map_err(|_| format!("gateway {gateway:?} is not an address"))?)
            }
        };
        pod.routes.push((address(&route.dst)?, gateway));
    }
    if let Some(dns) = raw.dns {
        pod.dns.servers = dns.nameservers.unwrap_or_default();
        pod.dns.searches = dns.search.unwrap_or_default();
        pod.dns.options = dns.options.unwrap_or_default();
        if let Some(domain) = dns.domain.filter(|domain| !domain.is_empty() && pod.dns.searches.is_empty()) {
            pod.dns.searches.push(domain);
        }
    }
    Ok(pod)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn addresses(result: Value) -> Vec<String> {
        parse(&result).unwrap().addresses.iter().map(IpNet::to_string).collect()
    }

    #[test]
    fn version_0_2_has_one_address_of_each_family() {
        let pod = parse(&json!({
            "cniVersion": "0.2.0",
            "ip4": {"ip": "10.1.0.5/16", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0"}]},
            "ip6": {"ip": "fd00::5/64", "routes": [{"dst": "::/0", "gw": "fd00::1"}]},
            "dns": {"nameservers": ["10.96.0.10"], "domain": "cluster.local"},
        }))
        .unwrap();
        assert_eq!(pod.addresses, ["10.1.0.5/16".parse().unwrap(), "fd00::5/64".parse().unwrap()]);
        assert_eq!(pod.routes[0], ("0.0.0.0/0".parse().unwrap(), None));
        assert_eq!(pod.routes[1], ("::/0".parse().unwrap(), Some("fd00::1".parse().unwrap())));
        assert_eq!(pod.dns.servers, ["10.96.0.10"]);
        assert_eq!(pod.dns.searches, ["cluster.local"]);
    }

    #[test]
    fn versions_0_3_and_0_4_list_addresses_with_their_version() {
        let interfaces = json!([
            {"name": "cni0", "mac": "00:11:22:33:44:55"},
            {"name": "eth0", "mac": "99:88:77:66:55:44", "sandbox": "/run/netns/a"},
        ]);
        for version in ["0.3.1", "0.4.0"] {
            let found = addresses(json!({
                "cniVersion": version,
                "interfaces": interfaces,
                "ips": [
                    {"version": "4", "address": "10.1.0.1/16", "interface": 0},
                    {"version": "4", "address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1},
                    {"version": "6", "address": "fd00::5/64"},
                ],
                "routes": null, "dns": {},
            }));
            assert_eq!(found, ["10.1.0.5/16", "fd00::5/64"], "the bridge's own address is not the pod's");
        }
    }

    #[test]
    fn versions_1_0_and_1_1_with_their_new_fields() {
        for version in ["1.0.0", "1.1.0"] {
            let found = addresses(json!({
                "cniVersion": version,
                "interfaces": [{"name": "eth0", "sandbox": "/n", "mtu": 1450, "socketPath": "", "pciID": ""}],
                "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 0}],
                "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1", "mtu": 1400, "advmss": 1360, "priority": 10,
                            "table": 254, "scope": 0}],
            }));
            assert_eq!(found, ["10.1.0.5/16"]);
        }
    }

    #[test]
    fn what_is_no_result_is_refused_in_words() {
        for (result, words) in [
            (json!([]), "expected"),
            (json!({"ips": [{"address": "10.0.0.300/8"}]}), "10.0.0.300/8"),
            (json!({"ips": [{"address": "10.0.0.3/33"}]}), "10.0.0.3/33"),
            (json!({"ips": [{"address": "10.0.0.3"}]}), "prefix length"),
            (json!({"ips": [{"address": "10.0.0.3/8", "interface": 4}]}), "interface 4"),
            (json!({"routes": [{"dst": "0.0.0.0/0", "gw": "router"}]}), "router"),
        ] {
            let error = parse(&result).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let key = prop::sample::select(vec![
            "ips",
            "interfaces",
            "routes",
            "dns",
            "ip4",
            "ip6",
            "ip",
            "dst",
            "gw",
            "address",
            "interface",
            "sandbox",
            "nameservers",
            "domain",
        ]);
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            "[0-9a-f.:/]{0,12}".prop_map(Value::from),
            Just(Value::from("10.0.0.1/8")),
        ];
        leaf.prop_recursive(4, 40, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(key.clone().prop_map(String::from), inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(result in json_value()) {
            if let Ok(pod) = parse(&result) {
                for address in pod.addresses {
                    prop_assert!(address.prefix_len() <= address.max_prefix_len());
                }
            }
        }
    }
}
