//! Entrances for `tests/fuzz`: CNI's configurations, what plugins answer, and the host's `resolv.conf`.

use serde_json::Value;

use super::conflist::{self, NetworkList, is_identifier};
use super::record::Intent;
use super::{resolv_conf, result};

/// Reads a configuration as a list, or as that of a single plugin. It can be recorded with a pod, and is then read as
/// the same.
///
/// # Panics
/// A name is taken that could lead out of a directory, or the record has another configuration.
pub fn configuration(bytes: &[u8], list: bool) {
    let Ok(network) = conflist::parse(bytes, list) else { return };
    assert!(is_identifier(&network.name), "{network:?}");
    for plugin in &network.plugins {
        assert!(
            conflist::plugin_type(plugin).is_ok_and(|name| !name.contains('/') && name != ".."),
            "{plugin:?}"
        );
    }
    let recorded =
        serde_json::to_vec(&network).ok().map(|bytes| serde_json::from_slice::<NetworkList>(&bytes).ok());
    assert_eq!(recorded, Some(Some(network)));
}

/// Reads what a plugin answers to ADD.
pub fn answer(bytes: &[u8]) {
    let Ok(answer) = serde_json::from_slice::<Value>(bytes) else { return };
    let _ = result::parse(&answer);
}

/// Reads the record of a pod's network.
///
/// # Panics
/// The record is another one after it was written.
pub fn record(bytes: &[u8]) {
    let Ok(intent) = serde_json::from_slice::<Intent>(bytes) else { return };
    let written = serde_json::to_vec(&intent).ok().map(|bytes| serde_json::from_slice::<Intent>(&bytes).ok());
    assert_eq!(written, Some(Some(intent)));
}

/// Reads the resolver's configuration. No name of it has blanks.
///
/// # Panics
/// One has.
pub fn resolver(text: &str) {
    let dns = resolv_conf::parse(text);
    let all = dns.servers.iter().chain(&dns.searches).chain(&dns.options);
    assert!(all.clone().all(|word| !word.contains(char::is_whitespace)), "{dns:?}");
}
