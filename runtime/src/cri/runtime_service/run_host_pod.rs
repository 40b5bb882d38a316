//! RunPodSandbox for a handler of host pods: from a request to a supervisor
//! that waits for containers.

use std::sync::Arc;
use std::time::Instant;

use husk_proto::agent::{self, CreateSandboxRequest};
use husk_proto::cri;

use super::run_pod_sandbox::{asked_dns, guest_dns, millis, pod_ref, port_mappings};
use crate::config::Handler;
use crate::container::spec;
use crate::cri::error::Error;
use crate::cri::names;
use crate::host::{self, launch};
use crate::network::Dns;
use crate::node::Node;
use crate::sandbox::{BootTimes, Phase, Sandbox, lifecycle};
use crate::vm;

pub(super) async fn bring_up(
    node: &Arc<Node>,
    sandbox: &Arc<Sandbox>,
    handler: &Handler,
) -> Result<(), Error> {
    let started = Instant::now();
    let record = sandbox.record().clone();
    let config = &record.config;
    let cgroup = record.cgroup.clone().ok_or(host::Error::NoCgroups)?;

    let (netns, ips, dns) = if spec::host_network(config) {
        (None, Vec::new(), Dns::default())
    } else {
        let mappings = port_mappings(config)?;
        let attached = node.network.attach_host_pod(&pod_ref(&record, &mappings)?).await?;
        (Some(attached.netns), attached.ips, attached.dns)
    };
    let network = started.elapsed();

    let user_namespace = spec::user_namespace(config)?;
    let launching = Instant::now();
    let plan = launch::Plan {
        handler,
        run_dir: vm::run_dir(&node.config.run_dir, &sandbox.id),
        layers: sandbox.layers(),
        cgroup,
        netns: netns.clone(),
        own_ipc: !spec::host_ipc(config),
        group: user_namespace.as_ref().and_then(|users| Some(users.gids.first()?.host_id)),
    };
    let (machine, pid) = launch::launch(&plan).await?;
    let launched = launching.elapsed();

    let configuring = Instant::now();
    // For /etc/hosts; what is set up of the interface is CNI's work.
    let addresses = ips.iter().map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }));
    let interface =
        agent::Interface { name: "eth0".into(), addresses: addresses.collect(), ..Default::default() };
    let request = CreateSandboxRequest {
        sandbox_id: sandbox.id.to_string(),
        hostname: spec::host_name(config, true),
        dns: dns_of(config, dns),
        interfaces: if ips.is_empty() { Vec::new() } else { vec![interface] },
        sysctls: config.linux.as_ref().map(|linux| linux.sysctls.clone()).unwrap_or_default(),
        shared_pid_namespace: spec::shares_pid_namespace(config),
        user_namespace,
        ..Default::default()
    };
    machine.agent.call("configure sandbox", async |mut agent| agent.create_sandbox(request).await).await?;

    let boot = BootTimes {
        network: millis(network),
        agent: millis(launched),
        configure: millis(configuring.elapsed()),
        total: millis(started.elapsed()),
        ..BootTimes::default()
    };
    sandbox.set_machine(Some(machine.clone()));
    sandbox.update(|record| {
        record.phase = Phase::Ready;
        record.ips = ips.iter().map(ToString::to_string).collect();
        record.netns = netns.unwrap_or_default();
        record.vmm_pid = pid;
        record.boot = boot;
    })?;
    lifecycle::watch(sandbox, &machine);
    tracing::info!(
        sandbox = %sandbox.id,
        pod = names::sandbox(config),
        network_ms = boot.network,
        agent_ready_ms = boot.agent,
        sandbox_configured_ms = boot.configure,
        total_ms = boot.total,
        "host pod ready"
    );
    Ok(())
}

/// What the client says of DNS, else what the network's plugins say, else none:
/// then it is as on the host.
fn dns_of(config: &cri::PodSandboxConfig, network: Dns) -> Option<agent::Dns> {
    let nothing = asked_dns(config).is_none() && network == Dns::default();
    (!nothing).then(|| guest_dns(config, network))
}
