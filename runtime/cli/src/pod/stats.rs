//! `husk pod stats`: what pods use, their VMs' share of the host included.

use husk_config::Config;
use husk_proto::cri;
use serde_json::json;

use crate::client;
use crate::output::{self, Item, Options, short, units};

/// Shows what pods use of processors, memory and network, once.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk pod stats web")]
pub struct Arguments {
    /// The pods' ids, beginnings of ids, names, or NAMESPACE/NAME; without any, all pods.
    #[arg(value_name = "POD")]
    pods: Vec<String>,
    #[command(flatten)]
    output: Options,
}

const COLUMNS: [output::Column; 7] = [
    ("POD ID", "ShortID"),
    ("NAMESPACE", "Namespace"),
    ("NAME", "Name"),
    ("CPU TIME", "CPUTime"),
    ("MEMORY", "Memory"),
    ("RECEIVED", "Received"),
    ("SENT", "Sent"),
];

/// Prints a table.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect(&config.socket).await?;
    let all = client::pods(&mut client).await?;
    let mut wanted = Vec::new();
    for name in &arguments.pods {
        wanted.push(client::find(&all, name)?.id.as_str());
    }
    let request = cri::ListPodSandboxStatsRequest::default();
    let stats = client.list_pod_sandbox_stats(request).await.map_err(client::said)?.into_inner().stats;
    let is_wanted =
        |item: &Item| wanted.is_empty() || wanted.contains(&output::cell(item.get("ID")).as_str());
    let items = stats.iter().map(item).filter(is_wanted).collect();
    output::list(&arguments.output, false, &COLUMNS, items)
}

fn item(stats: &cri::PodSandboxStats) -> Item {
    let of = stats.attributes.clone().unwrap_or_default();
    let metadata = of.metadata.unwrap_or_default();
    let linux = stats.linux.clone().unwrap_or_default();
    let value = |value: Option<cri::UInt64Value>| value.map(|value| value.value);
    let in_units = |bytes: Option<u64>| bytes.map_or("--".to_owned(), units::in_units);
    let cpu = linux.cpu.and_then(|cpu| value(cpu.usage_core_nano_seconds));
    let memory = linux.memory.and_then(|memory| value(memory.working_set_bytes));
    let network = linux.network.and_then(|network| network.default_interface).unwrap_or_default();
    let (received, sent) = (value(network.rx_bytes), value(network.tx_bytes));
    let fields = json!({
        "ID": of.id,
        "ShortID": short(&of.id),
        "Namespace": metadata.namespace,
        "Name": metadata.name,
        "CPUTime": cpu.map_or("--".to_owned(), |nanos| format!("{:.2}s", nanos as f64 / 1e9)),
        "CPUNanoseconds": cpu,
        "Memory": in_units(memory),
        "MemoryBytes": memory,
        "Received": in_units(received),
        "ReceivedBytes": received,
        "Sent": in_units(sent),
        "SentBytes": sent,
    });
    fields.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_use_is_in_units_and_what_is_absent_is_not_zero() {
        let some = |value| Some(cri::UInt64Value { value });
        let cpu = Some(cri::CpuUsage { usage_core_nano_seconds: some(1_500_000_000), ..Default::default() });
        let linux = Some(cri::LinuxPodSandboxStats { cpu, ..Default::default() });
        let shown = item(&cri::PodSandboxStats { linux, ..Default::default() });
        assert_eq!([&shown["CPUTime"], &shown["Memory"], &shown["Sent"]], ["1.50s", "--", "--"]);
    }
}
