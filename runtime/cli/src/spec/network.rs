//! Flags of a pod's network and names.

use anyhow::{Context, bail};
use husk_proto::cri::{self, NamespaceMode};

use super::{Plan, Port};

/// Network, ports, names.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Network")]
pub struct Network {
    /// Publish a port on the host: `8080:80`, `127.0.0.1:8080:80/tcp`, `8000-8010:80-90`, `80` on a free port.
    #[arg(short, long, value_name = "[IP:][HOST_PORT:]PORT[/PROTOCOL]")]
    publish: Vec<Port>,
    /// Publish every port that the image exposes, on free ports of the host.
    #[arg(short = 'P', long)]
    publish_all: bool,
    /// The network: `default` is CNI's, `host` is the host's (for handlers of host containers).
    #[arg(long, visible_alias = "net", default_value = "default")]
    network: String,
    /// The host name; the container's name unless given.
    #[arg(long)]
    hostname: Option<String>,
    /// Ask this server for names.
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
    /// Look for names in this domain.
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// Add an option to resolv.conf.
    #[arg(long, value_name = "OPTION")]
    dns_option: Vec<String>,
    /// Add a name to /etc/hosts.
    #[arg(long, value_name = "NAME:ADDRESS")]
    add_host: Vec<String>,
}

impl Network {
    pub(super) fn apply(&self, plan: &mut Plan) -> anyhow::Result<()> {
        for port in &self.publish {
            plan.pod.port_mappings.extend(port.mappings()?);
        }
        plan.publish_all = self.publish_all;
        plan.pod.hostname = self.hostname.clone().unwrap_or_default();
        if !self.dns.is_empty() || !self.dns_search.is_empty() || !self.dns_option.is_empty() {
            plan.pod.dns_config = Some(cri::DnsConfig {
                servers: self.dns.clone(),
                searches: self.dns_search.clone(),
                options: self.dns_option.clone(),
            });
        }
        for given in &self.add_host {
            let (name, address) = given.split_once(':').context("--add-host: write NAME:ADDRESS")?;
            if address.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_err() {
                bail!("--add-host {given}: `{address}` is no IP address");
            }
            plan.hosts.push(format!("{}\t{name}", address.trim_matches(['[', ']'])));
        }
        let mode = match self.network.as_str() {
            "default" | "bridge" => NamespaceMode::Pod,
            "host" => NamespaceMode::Node,
            "none" => {
                bail!("--network none: CRI cannot ask for a pod without a network, and huskd makes none yet")
            }
            other => bail!("--network {other}: CNI's configuration decides; there are `default` and `host`"),
        };
        for options in super::security::namespaces(plan) {
            options.network = mode.into();
        }
        Ok(())
    }

    pub(super) fn flag_of_pod(&self) -> Option<&'static str> {
        [
            (!self.publish.is_empty(), "--publish"),
            (self.publish_all, "--publish-all"),
            (self.network != "default", "--network"),
            (self.hostname.is_some(), "--hostname"),
            (!self.dns.is_empty(), "--dns"),
            (!self.dns_search.is_empty(), "--dns-search"),
            (!self.dns_option.is_empty(), "--dns-option"),
        ]
        .into_iter()
        .find_map(|(given, flag)| given.then_some(flag))
    }
}
