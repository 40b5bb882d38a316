//! The pod's part of a CNI call: `CNI_ARGS`, and the capability arguments
//! of CNI's conventions (CONVENTIONS.md).

use serde_json::{Map, Value, json};

use super::pod::{PodRef, Protocol};

/// The burst of a pod that has been quiet, which it sends or receives at once:
/// a tenth of a second's worth, and never less than a few of the largest
/// segments, 64 KiB, that interfaces hand over in one piece. In bits.
const BURST_PART: u64 = 10;
const LEAST_BURST: u64 = 8 * 256 * 1024;
/// The largest burst, which plugins count in 32 bits.
const MOST_BURST: u64 = u32::MAX as u64;

/// Bits per second that make sense, as Kubernetes has them.
const RATES: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// `CNI_ARGS` as Kubernetes' plugins know them.
///
/// # Errors
/// The name that cannot be handed on, in words.
pub(super) fn args(pod: &PodRef<'_>) -> Result<String, String> {
    let mut args = "IgnoreUnknown=1".to_owned();
    for (key, value) in [
        ("K8S_POD_NAMESPACE", pod.namespace),
        ("K8S_POD_NAME", pod.name),
        ("K8S_POD_INFRA_CONTAINER_ID", pod.sandbox_id),
        ("K8S_POD_UID", pod.uid),
    ] {
        if value.contains([';', '=', '\0', '\n']) {
            return Err(format!("{value:?} cannot be handed to CNI plugins as {key}"));
        }
        args.push_str(&format!(";{key}={value}"));
    }
    Ok(args)
}

/// Capability arguments, for plugins that have the capability.
pub(super) fn capabilities(pod: &PodRef<'_>) -> Map<String, Value> {
    let mut capabilities = Map::new();
    let mappings = port_mappings(pod);
    if !mappings.is_empty() {
        capabilities.insert("portMappings".into(), mappings.into());
    }
    let mut limits = Map::new();
    for (rate, rate_name, burst_name) in [
        (pod.bandwidth.ingress, "ingressRate", "ingressBurst"),
        (pod.bandwidth.egress, "egressRate", "egressBurst"),
    ] {
        if let Some(rate) = rate {
            let burst = (rate / BURST_PART).clamp(LEAST_BURST, MOST_BURST);
            limits.insert(rate_name.into(), rate.into());
            limits.insert(burst_name.into(), burst.into());
        }
    }
    if !limits.is_empty() {
        capabilities.insert("bandwidth".into(), limits.into());
    }
    capabilities
}

fn port_mappings(pod: &PodRef<'_>) -> Vec<Value> {
    let mappings = pod.port_mappings.iter().filter(|mapping| mapping.host_port != 0).map(|mapping| {
        let protocol = match mapping.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        };
        let mut entry = json!({
            "hostPort": mapping.host_port,
            "containerPort": mapping.container_port,
            "protocol": protocol,
        });
        if let (Some(entry), Some(ip)) = (entry.as_object_mut(), mapping.host_ip) {
            entry.insert("hostIP".into(), ip.to_string().into());
        }
        entry
    });
    mappings.collect()
}

/// Capabilities that the pod needs and no plugin of the network has. The pod
/// starts without them.
pub(super) fn missing<'a>(wanted: &'a Map<String, Value>, plugins: &[Map<String, Value>]) -> Vec<&'a str> {
    let has = |plugin: &Map<String, Value>, name: &str| {
        plugin.get("capabilities").and_then(|has| has.get(name)) == Some(&Value::Bool(true))
    };
    wanted.keys().map(String::as_str).filter(|name| !plugins.iter().any(|plugin| has(plugin, name))).collect()
}

/// Bits per second from one of Kubernetes' quantities: "10M", "1.5Gi".
///
/// # Errors
/// The reason in words: the text is no quantity, or no rate that makes sense.
pub fn rate(text: &str) -> Result<u64, String> {
    quantity(text)
        .filter(|rate| RATES.contains(rate))
        .ok_or_else(|| format!("`{text}` is not a number of bits per second from 1k to 1P, such as `10M`"))
}

/// A whole number of Kubernetes' form: digits, perhaps a fraction, a suffix.
fn quantity(text: &str) -> Option<u64> {
    const SUFFIXES: [(&str, u128); 11] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("Pi", 1 << 50),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("P", 1_000_000_000_000_000),
        ("", 1),
    ];
    /// More digits than any rate has, and few enough for the arithmetic.
    const MOST_DIGITS: usize = 18;
    let (number, factor) =
        SUFFIXES.iter().find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))?;
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{part}");
    if digits.is_empty() || digits.len() > MOST_DIGITS || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let scale = 10u128.checked_pow(u32::try_from(part.len()).ok()?)?;
    u64::try_from(digits.parse::<u128>().ok()?.checked_mul(factor)?.div_ceil(scale)).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]

    use proptest::prelude::*;

    use super::*;
    use crate::pod::Bandwidth;

    const POD: PodRef<'_> = PodRef {
        sandbox_id: "aa",
        namespace: "default",
        name: "web",
        uid: "u-1",
        port_mappings: &[],
        bandwidth: Bandwidth { ingress: None, egress: None },
        filtered: true,
    };

    #[test]
    fn names_that_would_change_the_arguments_are_refused() {
        let target = PodRef { name: "web;K8S_POD_UID=other", ..POD };
        assert!(args(&target).unwrap_err().contains("K8S_POD_NAME"));
        assert_eq!(
            args(&POD).unwrap(),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=aa;K8S_POD_UID=u-1"
        );
    }

    #[test]
    fn rates_are_kubernetes_quantities() {
        for (text, want) in [
            ("10M", Some(10_000_000)),
            ("1.5Mi", Some(1_572_864)),
            ("2000", Some(2_000)),
            ("1k", Some(1_000)),
            ("1P", Some(1_000_000_000_000_000)),
            ("999", None),
            ("1.1P", None),
            ("", None),
            ("M", None),
            (".", None),
            ("-1M", None),
            ("10 M", None),
            ("ten", None),
            ("1.2.3M", None),
            ("99999999999999999999P", None),
        ] {
            assert_eq!(rate(text).ok(), want, "{text}");
        }
        assert!(rate("fast").unwrap_err().contains("`fast`"));
    }

    #[test]
    fn a_limit_comes_with_a_burst_that_a_large_segment_passes() {
        let of = |ingress, egress| capabilities(&PodRef { bandwidth: Bandwidth { ingress, egress }, ..POD });
        assert!(of(None, None).is_empty());
        let limits = of(Some(1_000_000), Some(100_000_000));
        assert_eq!(
            Value::from(limits),
            json!({"bandwidth": {
                "ingressRate": 1_000_000, "ingressBurst": LEAST_BURST,
                "egressRate": 100_000_000, "egressBurst": 10_000_000,
            }})
        );
        let most = of(Some(*RATES.end()), None);
        assert_eq!(most["bandwidth"]["ingressBurst"], json!(MOST_BURST));
    }

    #[test]
    fn what_no_plugin_takes_is_known() {
        let Value::Object(wanted) = json!({"bandwidth": {}, "portMappings": []}) else { unreachable!() };
        let Value::Object(plugin) =
            json!({"type": "x", "capabilities": {"portMappings": true, "bandwidth": false}})
        else {
            unreachable!()
        };
        assert_eq!(missing(&wanted, &[plugin]), ["bandwidth"]);
    }

    proptest! {
        #[test]
        fn any_text_is_a_sane_rate_or_refused(text in "[0-9.kMGTPi]{0,24}|\\PC{0,12}") {
            if let Ok(rate) = rate(&text) {
                prop_assert!(RATES.contains(&rate));
            }
        }
    }
}
