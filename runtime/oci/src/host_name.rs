//! The host name of a pod: one rule for its `/etc/hostname`, its UTS
//! namespace, and its containers' variable `HOSTNAME`.

use husk_proto::cri;

use super::host_namespaces::host_network;

/// The most bytes of a pod's name that become a host name; the kubelet cuts it so too.
const LONGEST: usize = 63;

/// The host name that the client asks for; else the node's for a host pod in the host's
/// network; else the pod's own name.
#[must_use]
pub fn host_name(sandbox: &cri::PodSandboxConfig, on_host: bool) -> String {
    if !sandbox.hostname.is_empty() {
        return sandbox.hostname.clone();
    }
    if on_host && host_network(sandbox) {
        return nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
    }
    let name = sandbox.metadata.as_ref().map_or("", |pod| pod.name.as_str());
    let cut = name.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= LONGEST).last();
    name.get(..cut.unwrap_or(0)).unwrap_or_default().trim_end_matches(['-', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_name_is_cut_to_a_host_name() {
        let named = |name: &str, hostname: &str| {
            let metadata = cri::PodSandboxMetadata { name: name.into(), ..Default::default() };
            let sandbox = cri::PodSandboxConfig {
                metadata: Some(metadata),
                hostname: hostname.into(),
                ..Default::default()
            };
            host_name(&sandbox, false)
        };
        assert_eq!(named("pod", ""), "pod");
        assert_eq!(named("pod", "host"), "host");
        assert_eq!(named(&"a".repeat(70), ""), "a".repeat(63));
        assert_eq!(named(&format!("{}-.tail", "a".repeat(61)), ""), "a".repeat(61));
        assert_eq!(named(&"é".repeat(40), "").len(), 62);
    }
}
