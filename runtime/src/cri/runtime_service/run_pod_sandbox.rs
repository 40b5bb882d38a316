//! RunPodSandbox: from a request to a machine whose agent waits for containers.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_proto::agent::{self, CreateSandboxRequest};
use husk_proto::cri::{self, RunPodSandboxRequest, RunPodSandboxResponse};
use tokio::sync::oneshot;

use super::{run_host_pod, sandbox_config};
use crate::config::{Handler, Kind};
use crate::container::{now, spec};
use crate::cri::error::Error;
use crate::cri::names;
use crate::events::EventKind;
use crate::id::SandboxId;
use crate::network::{Attachment, Dns, PodRef, PortMapping, Protocol, resolv_conf};
use crate::node::Node;
use crate::sandbox::{BootTimes, Phase, Record, Sandbox, Size, lifecycle};
use crate::vm::launch::{MAIN_MAC, Nic};
use crate::vm::{self, launch};

/// Fresh bytes for the guest's random number generator.
const SEED: usize = 64;

/// Makes a pod, or leaves nothing behind.
pub(super) async fn run_pod_sandbox(
    node: &Arc<Node>,
    request: RunPodSandboxRequest,
) -> Result<RunPodSandboxResponse, Error> {
    let config = request.config.ok_or_else(|| Error::InvalidArgument("no sandbox configuration".into()))?;
    let (handler_name, handler) = node.config.handler(&request.runtime_handler).ok_or_else(|| {
        let known: Vec<_> = node.config.handlers.keys().map(String::as_str).collect();
        Error::InvalidArgument(format!(
            "unknown runtime handler `{}`: configured are {}",
            request.runtime_handler,
            known.join(", ")
        ))
    })?;

    check_namespaces(&config, node, handler)?;
    sandbox_config::check(&config, handler.kind())?;

    let id = SandboxId::random();
    let name = node.registry.reserve(names::sandbox(&config), id.as_str())?;
    let parent = config.linux.as_ref().map(|linux| linux.cgroup_parent.as_str()).unwrap_or_default();
    let record = Record {
        id: id.clone(),
        handler: handler_name.to_owned(),
        kind: handler.kind(),
        created_at: now(),
        phase: Phase::Creating,
        ips: Vec::new(),
        netns: Default::default(),
        vmm_pid: 0,
        cgroup: launch::cgroup_for(parent, &id),
        oom_kills: 0,
        size: (handler.kind() == Kind::Vm).then(|| size(&config, handler)),
        image_slots: (handler.kind() == Kind::Vm).then_some(handler.image_slots),
        boot: BootTimes::default(),
        problem: String::new(),
        config,
    };
    let sandbox =
        Arc::new(Sandbox::create(node.sandboxes_dir().join(id.as_str()), record, node.events.clone())?);

    let up = match handler.kind() {
        Kind::Vm => bring_up(node, &sandbox, handler).await,
        Kind::Host => run_host_pod::bring_up(node, &sandbox, handler).await,
    };
    if let Err(error) = up {
        tracing::warn!(sandbox = %id, %error, "pod did not start; undoing");
        if let Err(undo) = lifecycle::stop(node, &sandbox).await {
            tracing::warn!(sandbox = %id, error = %undo, "undo a pod that did not start; its client can stop and remove it");
            node.registry.add_sandbox(sandbox.clone());
            name.keep();
        } else {
            lifecycle::forget(node, &sandbox)?;
        }
        return Err(error);
    }
    node.registry.add_sandbox(sandbox.clone());
    name.keep();
    for what in [EventKind::Created, EventKind::Started] {
        sandbox.send_event(id.as_str(), what);
    }
    Ok(RunPodSandboxResponse { pod_sandbox_id: id.to_string() })
}

async fn bring_up(node: &Arc<Node>, sandbox: &Arc<Sandbox>, handler: &Handler) -> Result<(), Error> {
    let started = Instant::now();
    let record = sandbox.record().clone();
    let config = &record.config;

    let entropy = seed(crate::random::fill)?;
    let size = size(config, handler);
    let plan = |nics| launch::Plan {
        id: &sandbox.id,
        handler,
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        run_dir: vm::run_dir(&node.config.run_dir, &sandbox.id),
        scratch: sandbox.scratch(),
        nics,
        cgroup: record.cgroup.clone(),
    };

    // The machine boots while the CNI plugins are at work: it needs a tap for
    // that, and nothing that they decide.
    let (early, main_tap) = oneshot::channel();
    let mappings = port_mappings(config)?;
    let attach = async {
        let attached = node.network.attach(&pod_ref(&record, &mappings)?, early).await?;
        Ok::<_, Error>((attached, started.elapsed()))
    };
    let boot = async {
        node.scratch.create(&sandbox.scratch(), handler.disk_mib).await?;
        // Without a tap the other branch has failed, and says why.
        let Ok(tap) = main_tap.await else { return std::future::pending().await };
        let nic =
            Nic { tap: tap.try_clone().map_err(|error| Error::Internal(error.to_string()))?, mac: MAIN_MAC };
        Ok((node.templates.launch(&plan(vec![nic])).await?, tap))
    };
    let ((network, network_time), (mut launched, main_tap)) = tokio::try_join!(attach, boot)?;

    let Attachment { netns, ips, mut interfaces, routes, dns } = network;
    let mut guest_interfaces: Vec<_> = interfaces.iter().map(guest_interface).collect();
    if interfaces.len() > 1 {
        // The plugins made more than could be known: once more, with all.
        tracing::info!(sandbox = %sandbox.id, interfaces = interfaces.len(), "boot again for more interfaces");
        drop(launched);
        vm::destroy(&vm::run_dir(&node.config.run_dir, &sandbox.id)).await?;
        let mut main_tap = Some(main_tap);
        let nics = interfaces.iter_mut().filter_map(|interface| {
            let tap = interface.tap.take().or_else(|| main_tap.take())?;
            Some(Nic { tap, mac: interface.mac })
        });
        launched = node.templates.launch(&plan(nics.collect())).await?;
    } else if let Some(main) = guest_interfaces.first_mut() {
        main.device_mac = mac_text(MAIN_MAC);
    }

    let configuring = Instant::now();
    let request = CreateSandboxRequest {
        sandbox_id: sandbox.id.to_string(),
        hostname: spec::host_name(config, false),
        dns: Some(guest_dns(config, or_hosts(config, dns))),
        interfaces: guest_interfaces,
        routes: routes.into_iter().map(guest_route).collect(),
        sysctls: config.linux.as_ref().map(|linux| linux.sysctls.clone()).unwrap_or_default(),
        shared_pid_namespace: spec::shares_pid_namespace(config),
        scratch_serial: launch::SCRATCH_SERIAL.into(),
        time_unix_nanos: now(),
        entropy,
        shm_size: 0,
        user_namespace: spec::user_namespace(config)?,
        hooks: spec::hooks::programs(&handler.hooks)?,
    };
    let machine = launched.machine;
    machine.agent.call("configure sandbox", async |mut agent| agent.create_sandbox(request).await).await?;

    let boot = BootTimes {
        network: millis(network_time),
        vmm: millis(launched.vmm),
        kernel: millis(launched.kernel),
        agent: millis(launched.agent),
        configure: millis(configuring.elapsed()),
        total: millis(started.elapsed()),
    };
    sandbox.set_machine(Some(machine.clone()));
    sandbox.update(|record| {
        record.phase = Phase::Ready;
        record.ips = ips.iter().map(ToString::to_string).collect();
        record.netns = netns;
        record.vmm_pid = launched.vmm_pid;
        record.oom_kills = record.cgroup.as_deref().map_or(0, vm::oom_kills);
        record.boot = boot;
    })?;
    lifecycle::watch(sandbox, &machine);
    tracing::info!(
        sandbox = %sandbox.id,
        pod = names::sandbox(config),
        network_ms = boot.network,
        vmm_exec_ms = boot.vmm,
        kernel_to_agent_ms = boot.kernel,
        agent_ready_ms = boot.agent,
        sandbox_configured_ms = boot.configure,
        total_ms = boot.total,
        cloned = launched.cloned,
        "pod ready"
    );
    Ok(())
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A pod in a virtual machine is refused the host's namespaces with the name of
/// the handler that has them.
fn check_namespaces(config: &cri::PodSandboxConfig, node: &Node, handler: &Handler) -> Result<(), Error> {
    if handler.kind() == Kind::Host {
        return Ok(());
    }
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = security.and_then(|security| security.namespace_options.as_ref());
    for (what, mode) in [
        ("network", options.map(|options| options.network)),
        ("pid", options.map(|options| options.pid)),
        ("ipc", options.map(|options| options.ipc)),
    ] {
        if mode == Some(cri::NamespaceMode::Node as i32) {
            return Err(Error::InvalidArgument(format!(
                "the pod asks for the host's {what} namespace, which a pod in a virtual machine cannot have: {}",
                instead(node)
            )));
        }
    }
    Ok(())
}

/// The handler that runs what a virtual machine cannot.
fn instead(node: &Node) -> String {
    match node.config.handlers.iter().find(|(_, handler)| handler.kind() == Kind::Host) {
        Some((name, _)) => format!("run it with the runtime handler `{name}`"),
        None => "no handler of kind `host` is enabled in the configuration".into(),
    }
}

/// The pod as its network needs to know it.
pub(super) fn pod_ref<'a>(record: &'a Record, port_mappings: &'a [PortMapping]) -> Result<PodRef<'a>, Error> {
    let (name, namespace, uid) = record
        .config
        .metadata
        .as_ref()
        .map(|pod| (pod.name.as_str(), pod.namespace.as_str(), pod.uid.as_str()))
        .unwrap_or_default();
    let bandwidth = sandbox_config::bandwidth(&record.config)?;
    Ok(PodRef { sandbox_id: record.id.as_str(), namespace, name, uid, port_mappings, bandwidth })
}

pub(super) fn port_mappings(config: &cri::PodSandboxConfig) -> Result<Vec<PortMapping>, Error> {
    let wrong =
        |what: &str, value: &dyn std::fmt::Display| Error::InvalidArgument(format!("{what} `{value}`"));
    let port = |port: i32| u16::try_from(port).map_err(|_| wrong("port", &port));
    let mut mappings = Vec::new();
    // A mapping without a port on the host only documents the container's.
    for mapping in config.port_mappings.iter().filter(|mapping| mapping.host_port != 0) {
        let protocol = match cri::Protocol::try_from(mapping.protocol) {
            Ok(cri::Protocol::Tcp) => Protocol::Tcp,
            Ok(cri::Protocol::Udp) => Protocol::Udp,
            Ok(cri::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => return Err(wrong("protocol of port mapping", &mapping.protocol)),
        };
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            ip => Some(ip.parse().map_err(|_| wrong("host_ip of port mapping", &ip))?),
        };
        mappings.push(PortMapping {
            host_port: port(mapping.host_port)?,
            container_port: port(mapping.container_port)?,
            protocol,
            host_ip,
        });
    }
    Ok(mappings)
}

/// What the pod's containers may use together, when the client says so.
fn pod_resources(config: &cri::PodSandboxConfig) -> Option<&cri::LinuxContainerResources> {
    config.linux.as_ref()?.resources.as_ref()
}

/// The machine that a pod needs.
pub(super) fn size(config: &cri::PodSandboxConfig, handler: &Handler) -> Size {
    Size { vcpus: vcpus(config, handler), memory_mib: memory_mib(config, handler) }
}

/// As many as the pod's CPU limit takes, at least the handler's number.
fn vcpus(config: &cri::PodSandboxConfig, handler: &Handler) -> u8 {
    let limit = pod_resources(config).filter(|limit| limit.cpu_quota > 0 && limit.cpu_period > 0);
    let wanted =
        limit.map_or(0, |limit| limit.cpu_quota.unsigned_abs().div_ceil(limit.cpu_period.unsigned_abs()));
    u8::try_from(wanted.min(64)).unwrap_or(64).max(handler.vcpus)
}

/// The handler's own memory for the guest, and the pod's limit on top.
fn memory_mib(config: &cri::PodSandboxConfig, handler: &Handler) -> u32 {
    let limit = pod_resources(config).map_or(0, |limit| limit.memory_limit_in_bytes.max(0).unsigned_abs());
    let limit = u32::try_from(limit.div_ceil(1 << 20)).unwrap_or(u32::MAX);
    handler.memory_mib.saturating_add(limit)
}

/// The host's, where neither client nor network says anything.
fn or_hosts(config: &cri::PodSandboxConfig, network: Dns) -> Dns {
    if asked_dns(config).is_none() && network == Dns::default() { resolv_conf::of_host() } else { network }
}

/// What the client says of DNS; a configuration with nothing in it says nothing.
pub(super) fn asked_dns(config: &cri::PodSandboxConfig) -> Option<&cri::DnsConfig> {
    let asked = config.dns_config.as_ref();
    asked.filter(|dns| !(dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty()))
}

/// What the client says of DNS, else what the network's plugins say.
pub(super) fn guest_dns(config: &cri::PodSandboxConfig, network: Dns) -> agent::Dns {
    match asked_dns(config) {
        Some(dns) => agent::Dns {
            servers: dns.servers.clone(),
            searches: dns.searches.clone(),
            options: dns.options.clone(),
        },
        None => agent::Dns { servers: network.servers, searches: network.searches, options: network.options },
    }
}

fn guest_interface(interface: &crate::network::GuestInterface) -> agent::Interface {
    agent::Interface {
        name: interface.name.clone(),
        mac: mac_text(interface.mac),
        mtu: interface.mtu.into(),
        addresses: interface.addresses.clone(),
        device_mac: String::new(),
    }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn guest_route(route: crate::network::Route) -> agent::Route {
    agent::Route {
        destination: route.destination,
        gateway: route.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
        interface: route.interface,
    }
}

/// The machine's own random numbers begin with it. A clone that had none would
/// go on with those of its template, as every other clone.
fn seed(fill: impl FnOnce(&mut [u8]) -> io::Result<()>) -> Result<Vec<u8>, Error> {
    let mut seed = vec![0u8; SEED];
    match fill(&mut seed) {
        Ok(()) => Ok(seed),
        Err(error) => {
            Err(Error::Internal(format!("draw a seed for the machine's random numbers: getrandom: {error}")))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_pod_without_a_seed_does_not_start() {
        let error = seed(|_| Err(io::ErrorKind::PermissionDenied.into())).unwrap_err().to_string();
        assert!(error.contains("seed") && error.contains("getrandom"), "{error}");
        assert!(matches!(seed(crate::random::fill), Ok(seed) if seed.len() == SEED));
    }

    #[test]
    fn name_service_that_is_asked_for_with_nothing_is_not_asked_for() {
        let network = || Dns { servers: vec!["10.0.0.1".into()], ..Dns::default() };
        let pod = |dns_config| cri::PodSandboxConfig { dns_config, ..Default::default() };
        let servers = |pod: &cri::PodSandboxConfig| guest_dns(pod, or_hosts(pod, network())).servers;
        let empty = pod(Some(cri::DnsConfig::default()));
        assert_eq!(servers(&empty), ["10.0.0.1"]);
        assert_eq!(servers(&pod(None)), ["10.0.0.1"]);
        assert_eq!(or_hosts(&empty, Dns::default()), resolv_conf::of_host());
        let options = cri::DnsConfig { options: vec!["ndots:5".into()], ..Default::default() };
        let asked = pod(Some(options));
        assert_eq!(guest_dns(&asked, or_hosts(&asked, network())).options, ["ndots:5"]);
        assert!(servers(&asked).is_empty(), "what is asked for stands alone");
    }
}
