//! `husk stats`: what containers use.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::bail;
use husk_config::Config;
use husk_proto::cri;
use serde_json::json;

use super::client::{self, Client};
use super::output::{self, Item, Options, short, time, units};
use super::{find, labels};

/// The time between two samples; huskd counts a rate over a second or more.
const PAUSE: Duration = Duration::from_millis(1100);

/// Shows what containers use of processors, memory and disk.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk stats --no-stream web")]
pub struct Arguments {
    /// The containers' ids, beginnings of ids, or names; without any, all that run.
    containers: Vec<String>,
    /// Print one sample, and do not go on.
    #[arg(long)]
    no_stream: bool,
    #[command(flatten)]
    output: Options,
}

const COLUMNS: [output::Column; 5] = [
    ("CONTAINER ID", "ShortID"),
    ("NAME", "Name"),
    ("CPU %", "CPUPerc"),
    ("MEMORY", "Memory"),
    ("DISK", "Disk"),
];

/// Prints a table now and then, or once.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect(&config.socket).await?;
    let mut ids = Vec::new();
    for wanted in &arguments.containers {
        ids.push(find::container(&mut client, wanted).await?.id);
    }
    // The first sample of a container has no rate.
    sample(&mut client, &ids).await?;
    loop {
        tokio::time::sleep(PAUSE).await;
        let items = sample(&mut client, &ids).await?;
        if !arguments.no_stream && std::io::stdout().is_terminal() {
            output::print("\x1b[H\x1b[J")?;
        }
        output::list(&arguments.output, false, &COLUMNS, items)?;
        if arguments.no_stream {
            return Ok(());
        }
    }
}

async fn sample(client: &mut Client, ids: &[String]) -> anyhow::Result<Vec<Item>> {
    let request = cri::ListContainerStatsRequest::default();
    let stats = client.list_container_stats(request).await.map_err(client::said)?.into_inner().stats;
    let id =
        |stats: &cri::ContainerStats| stats.attributes.as_ref().map_or(String::new(), |of| of.id.clone());
    if let Some(ended) = ids.iter().find(|wanted| !stats.iter().any(|stats| id(stats) == **wanted)) {
        bail!("container {ended} does not run");
    }
    Ok(stats.iter().filter(|stats| ids.is_empty() || ids.contains(&id(stats))).map(item).collect())
}

fn item(stats: &cri::ContainerStats) -> Item {
    let of = stats.attributes.clone().unwrap_or_default();
    let value = |value: Option<cri::UInt64Value>| value.map(|value| value.value);
    let cpu = stats.cpu.unwrap_or_default();
    let memory = stats.memory.and_then(|memory| value(memory.working_set_bytes));
    let disk = stats.writable_layer.as_ref().and_then(|layer| value(layer.used_bytes));
    let name = of.labels.get(labels::NAME).cloned();
    let name = name.or_else(|| of.metadata.map(|metadata| metadata.name)).unwrap_or_default();
    let in_units = |bytes: Option<u64>| bytes.map_or("--".to_owned(), units::in_units);
    // A processor's whole second is 10⁹ ns.
    let percent =
        value(cpu.usage_nano_cores).map_or("--".to_owned(), |nanos| format!("{:.2}%", nanos as f64 / 1e7));
    let fields = json!({
        "ID": of.id,
        "ShortID": short(&of.id),
        "Name": name,
        "CPUPerc": percent,
        "CPUNanoseconds": value(cpu.usage_core_nano_seconds),
        "Memory": in_units(memory),
        "MemoryBytes": memory,
        "Disk": in_units(disk),
        "DiskBytes": disk,
        "Time": time::rfc3339(cpu.timestamp),
    });
    fields.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_in_units_and_what_is_absent_is_not_zero() {
        let some = |value| Some(cri::UInt64Value { value });
        let cpu = cri::CpuUsage { usage_nano_cores: some(500_000_000), ..Default::default() };
        let memory = cri::MemoryUsage { working_set_bytes: some(3 << 20), ..Default::default() };
        let shown = item(&cri::ContainerStats { cpu: Some(cpu), memory: Some(memory), ..Default::default() });
        assert_eq!([&shown["CPUPerc"], &shown["Memory"], &shown["Disk"]], ["50.00%", "3.0MiB", "--"]);
        assert_eq!(item(&cri::ContainerStats::default())["CPUPerc"], "--");
    }
}
