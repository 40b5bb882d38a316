//! `husk info`: one pod and its machine.

use anyhow::Context;
use husk_config::Config;
use husk_proto::cri;

use super::{client, find, output, pods};

/// Shows one pod, its machine and its containers.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The pod's id, the beginning of its id, its name, or NAMESPACE/NAME.
    pod: String,
}

/// Prints a line for each property.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect(&config.socket).await?;
    let all = client::pods(&mut client).await?;
    let id = client::find(&all, &arguments.pod)?.id.clone();
    let answer = client::status(&mut client, &id).await?;
    let unreached = client::unreached(&answer);
    let status = answer.status.context("huskd knows the pod and says nothing about it")?;
    let metadata = status.metadata.clone().unwrap_or_default();
    let line = |name: &str, value: &str| println!("{name:<13}{value}");
    line("pod", &format!("{}/{}", metadata.namespace, metadata.name));
    line("id", &id);
    line("state", pods::state(status.state()));
    if let Some(why) = &unreached {
        line("unreached", why);
    }
    line("age", &output::time::age(status.created_at));
    line("handler", &status.runtime_handler);
    if let Some(network) = &status.network {
        let more = network.additional_ips.iter().map(|ip| ip.ip.as_str());
        let ips: Vec<_> =
            std::iter::once(network.ip.as_str()).chain(more).filter(|ip| !ip.is_empty()).collect();
        line("ip", &ips.join(" "));
    }
    let machine = match client::control(config, &id) {
        Some(control) => Some(control.info().await),
        None => None,
    };
    match machine {
        None => line("machine", "none: its containers are the host's"),
        Some(Err(error)) => line("machine", &format!("does not run: {error}")),
        Some(Ok(machine)) => {
            line("machine", &format!("process {}", machine.pid));
            line("entered", &format!("{} ms after its start", machine.boot_us / 1000));
            let mib = |bytes: u64| bytes / (1024 * 1024);
            line("memory", &format!("{} MiB of the host", mib(machine.guest_resident_bytes)));
            line("balloon", &format!("{} MiB", machine.balloon_mib));
        }
    }
    let filter = cri::ContainerFilter { pod_sandbox_id: id, ..Default::default() };
    let request = cri::ListContainersRequest { filter: Some(filter) };
    for container in client.list_containers(request).await.map_err(client::said)?.into_inner().containers {
        let name = container.metadata.as_ref().map_or("", |metadata| metadata.name.as_str());
        let state = find::state(container.state());
        let short = output::short(&container.id);
        line("container", &format!("{short}  {name}  {state}"));
    }
    Ok(())
}
