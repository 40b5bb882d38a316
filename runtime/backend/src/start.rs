//! Starts a pod: its network, and what it runs in, until its agent can be asked.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_config::{Handler, HostHandler, Limits};
use husk_hostpod::launch;
use husk_network::{Dns, Network, PodRef, resolv_conf};
use husk_proto::agent::{self, CreateSandboxRequest};
use husk_proto::cri;
use husk_vm::SandboxDisks;
use husk_vm::template::Templates;

use crate::{Backend, Error, ImageDisks, Place, RunningPod, start_vm};

/// Parts of the node that a start needs.
#[derive(Clone, Copy, Debug)]
pub struct Services<'a> {
    /// The networks of pods.
    pub network: &'a Network,
    /// The templates from which VMs are cloned.
    pub templates: &'a Arc<Templates>,
    /// The writable disks of VMs.
    pub disks: &'a SandboxDisks,
}

/// A pod that is to be started.
#[derive(Debug)]
pub struct StartPlan<'a> {
    /// Where it will be.
    pub place: Place,
    /// The handler that its client chose.
    pub handler: &'a Handler,
    /// The client's configuration of it.
    pub config: &'a cri::PodSandboxConfig,
    /// The pod as its network knows it.
    pub network: PodRef<'a>,
    /// How much a VM's devices may do.
    pub limits: Limits,
    /// The file of a VM's writable disk; made here.
    pub scratch: PathBuf,
    /// The folder of a host pod's writable layers; made here.
    pub layers: PathBuf,
}

/// A pod that was started.
#[derive(Debug)]
pub struct Started {
    /// The pod, which runs.
    pub running: RunningPod,
    /// The words for its agent about the pod, as far as they depend on the
    /// backend and the network.
    pub request: CreateSandboxRequest,
    /// The pod's network namespace; empty for the host's.
    pub netns: PathBuf,
    /// The pod's addresses, the main one first.
    pub ips: Vec<IpAddr>,
    /// Process id of its VMM or its supervisor.
    pub pid: u32,
    /// The VM is a clone of a template.
    pub cloned: bool,
    /// How long each step took.
    pub times: Times,
}

/// Times of the steps of a start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Network namespace, CNI and tap.
    pub network: Duration,
    /// Start of the VMM to the first entry into the guest.
    pub vmm: Duration,
    /// From there to the agent's first word.
    pub kernel: Duration,
    /// From there to an open connection; of a host pod, the start of its supervisor.
    pub agent: Duration,
}

/// Starts a pod.
///
/// # Errors
/// The error names the step in it. Whatever was started is left to [`Place::destroy`], and the
/// network to its own `detach`.
pub async fn start(services: Services<'_>, plan: &StartPlan<'_>) -> Result<Started, Error> {
    let _scope = plan.place.start_scope().await?;
    match plan.handler {
        Handler::Vm(handler) => start_vm::start(services, plan, handler).await,
        Handler::Host(handler) => start_host(services, plan, handler).await,
    }
}

async fn start_host(
    services: Services<'_>,
    plan: &StartPlan<'_>,
    handler: &HostHandler,
) -> Result<Started, Error> {
    let StartPlan { place, config, .. } = plan;
    let started = Instant::now();
    let cgroup = place.cgroup.clone().ok_or(husk_hostpod::Error::NoCgroups)?;
    let (netns, ips, dns) = if husk_oci::host_network(config) {
        (None, Vec::new(), Dns::default())
    } else {
        let attached = services.network.attach_host_pod(&plan.network).await?;
        (Some(attached.netns), attached.ips, attached.dns)
    };
    let network = started.elapsed();

    let users = husk_oci::user_namespace(config)?;
    let launching = Instant::now();
    let supervisor = launch::Plan {
        handler,
        run_dir: place.run_dir.clone(),
        layers: plan.layers.clone(),
        cgroup,
        netns: netns.clone(),
        own_ipc: !husk_oci::host_ipc(config),
        group: users.as_ref().and_then(|users| Some(users.gids.first()?.host_id)),
    };
    let (supervisor, agent, pid) = launch::launch(&supervisor).await?;
    let times = Times { network, agent: launching.elapsed(), ..Times::default() };

    // For /etc/hosts; what is set up of the interface is CNI's work.
    let addresses = ips.iter().map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }));
    let interface =
        agent::Interface { name: "eth0".into(), addresses: addresses.collect(), ..Default::default() };
    let request = CreateSandboxRequest {
        hostname: husk_oci::host_name(config, true),
        dns: host_dns(config, dns),
        interfaces: if ips.is_empty() { Vec::new() } else { vec![interface] },
        ..Default::default()
    };
    let running = RunningPod { backend: Backend::Host(supervisor), agent, disks: ImageDisks::unlimited() };
    Ok(Started { running, request, netns: netns.unwrap_or_default(), ips, pid, cloned: false, times })
}

/// DNS as the client asks, else as the network's plugins say, else none: the pod then
/// has the host's.
fn host_dns(config: &cri::PodSandboxConfig, network: Dns) -> Option<agent::Dns> {
    let nothing = asked_dns(config).is_none() && network == Dns::default();
    (!nothing).then(|| guest_dns(config, network))
}

/// The host's, where neither client nor network says anything.
pub(crate) async fn or_hosts(config: &cri::PodSandboxConfig, network: Dns) -> Dns {
    match asked_dns(config).is_none() && network == Dns::default() {
        true => resolv_conf::of_host().await,
        false => network,
    }
}

/// The client's configuration of DNS; one with nothing in it says nothing.
fn asked_dns(config: &cri::PodSandboxConfig) -> Option<&cri::DnsConfig> {
    let asked = config.dns_config.as_ref();
    asked.filter(|dns| !(dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty()))
}

/// DNS as the client asks, else as the network's plugins say.
pub(crate) fn guest_dns(config: &cri::PodSandboxConfig, network: Dns) -> agent::Dns {
    match asked_dns(config) {
        Some(dns) => agent::Dns {
            servers: dns.servers.clone(),
            searches: dns.searches.clone(),
            options: dns.options.clone(),
        },
        None => agent::Dns { servers: network.servers, searches: network.searches, options: network.options },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn name_service_that_is_asked_for_with_nothing_is_not_asked_for() {
        let network = || Dns { servers: vec!["10.0.0.1".into()], ..Dns::default() };
        let pod = |dns_config| cri::PodSandboxConfig { dns_config, ..Default::default() };
        let servers =
            async |pod: &cri::PodSandboxConfig| guest_dns(pod, or_hosts(pod, network()).await).servers;
        let empty = pod(Some(cri::DnsConfig::default()));
        assert_eq!(servers(&empty).await, ["10.0.0.1"]);
        assert_eq!(servers(&pod(None)).await, ["10.0.0.1"]);
        assert_eq!(or_hosts(&empty, Dns::default()).await, resolv_conf::of_host().await);
        let options = cri::DnsConfig { options: vec!["ndots:5".into()], ..Default::default() };
        let asked = pod(Some(options));
        assert_eq!(guest_dns(&asked, or_hosts(&asked, network()).await).options, ["ndots:5"]);
        assert!(servers(&asked).await.is_empty(), "what is asked for stands alone");
    }
}
