//! `husk port`: the ports of the host that lead into a container's pod.

use husk_config::Config;
use husk_proto::cri;

use super::{client, find, output};

/// Lists the ports of the host that lead to a container.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk port web 80")]
pub struct Arguments {
    /// The container's id, the beginning of its id, or its name.
    container: String,
    /// Show the port of the host for this port alone: `80`, `53/udp`.
    port: Option<String>,
}

/// Prints a line for each port.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect(&config.socket).await?;
    let container = find::container(&mut client, &arguments.container).await?;
    let pod = client::status(&mut client, &container.pod_sandbox_id).await?;
    let mappings = client::pod_config(&pod).port_mappings;
    let mappings = mappings.iter().filter(|mapping| mapping.host_port != 0);
    let Some(wanted) = &arguments.port else {
        let lines = mappings.map(|mapping| format!("{} -> {}\n", inside(mapping), outside(mapping)));
        return output::print(&lines.collect::<String>());
    };
    let wanted = if wanted.contains('/') { wanted.clone() } else { format!("{wanted}/tcp") };
    let lines: String =
        mappings.filter(|mapping| inside(mapping) == wanted).map(|mapping| outside(mapping) + "\n").collect();
    if lines.is_empty() {
        anyhow::bail!("port {wanted} of {} is not published on the host", arguments.container);
    }
    output::print(&lines)
}

fn inside(mapping: &cri::PortMapping) -> String {
    format!("{}/{}", mapping.container_port, mapping.protocol().as_str_name().to_lowercase())
}

fn outside(mapping: &cri::PortMapping) -> String {
    match mapping.host_ip.as_str() {
        "" => format!("0.0.0.0:{}", mapping.host_port),
        ip if ip.contains(':') => format!("[{ip}]:{}", mapping.host_port),
        ip => format!("{ip}:{}", mapping.host_port),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_as_docker_does() {
        let mapping = |ip: &str, protocol: cri::Protocol| cri::PortMapping {
            host_ip: ip.into(),
            protocol: protocol.into(),
            container_port: 53,
            host_port: 5353,
        };
        assert_eq!(inside(&mapping("", cri::Protocol::Udp)), "53/udp");
        assert_eq!(outside(&mapping("", cri::Protocol::Tcp)), "0.0.0.0:5353");
        assert_eq!(outside(&mapping("::1", cri::Protocol::Tcp)), "[::1]:5353");
    }
}
