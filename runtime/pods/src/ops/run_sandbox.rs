//! Starting a pod: from a client's configuration to an agent that waits for
//! containers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_backend::{StartPlan, VmSize};
use husk_base::id::SandboxId;
use husk_base::{cgroup, chain, now};
use husk_config::Handler;
use husk_network::{PodRef, PortMapping, Protocol};
use husk_proto::cri;

use super::{check_sandbox, lifecycle, sandbox_cgroup, vm_memory};
use crate::model::registry::Reservation;
use crate::model::{BootTimes, EventKind, Phase, Sandbox, SandboxOp, SandboxRecord, Unlocked, names};
use crate::{Error, Node, span};

/// Makes a pod, or leaves nothing behind.
///
/// # Errors
/// A configuration that a pod cannot have, or the step that failed.
pub async fn run_sandbox(
    node: &Arc<Node>,
    config: cri::PodSandboxConfig,
    runtime_handler: &str,
) -> Result<SandboxId, Error> {
    let (handler_name, handler) = node.config.handler(runtime_handler).ok_or_else(|| {
        let known: Vec<_> = node.config.handlers.keys().map(String::as_str).collect();
        Error::Invalid(format!(
            "unknown runtime handler `{runtime_handler}`: configured are {}",
            known.join(", ")
        ))
    })?;
    check_sandbox::check(node, &config, handler.kind())?;
    check_sandbox::limits(&config, handler)?;

    let id = SandboxId::random();
    span::note_sandbox(&id);
    let name = node.registry.reserve(names::sandbox(&config), id.as_str())?;
    let cgroup = sandbox_cgroup::choose(node.config.cgroup_driver, &config, &id)?;
    let record = SandboxRecord { cgroup, ..new_record(&id, handler_name, handler, config) };
    vm_memory::check(&record)?;
    let directory = node.sandboxes_dir().join(id.as_str());
    let sandbox = Arc::new(Sandbox::create(directory, record, node.events.clone()).await?);

    let mut unlocked = Unlocked::new();
    let op = sandbox.lock_op(&mut unlocked).await;
    if let Err(error) = bring_up(node, &op, handler).await {
        let error = vm_memory::explain_start(&sandbox.record(), error).await;
        tracing::warn!(error = chain(&error), "pod did not start; undoing");
        undo(node, &op, name).await?;
        return Err(error);
    }
    node.registry.add_sandbox(sandbox.clone());
    name.keep();
    for kind in [EventKind::Created, EventKind::Started] {
        sandbox.send_event(id.as_str(), kind);
    }
    Ok(id)
}

/// The record that is on disk before the first step, so that each can be undone.
fn new_record(
    id: &SandboxId,
    handler_name: &str,
    handler: &Handler,
    config: cri::PodSandboxConfig,
) -> SandboxRecord {
    let vm = handler.vm();
    SandboxRecord {
        id: id.clone(),
        handler: handler_name.to_owned(),
        kind: handler.kind(),
        created_at: now(),
        phase: Phase::Creating,
        ips: Vec::new(),
        netns: Default::default(),
        vmm_pid: 0,
        cgroup: None,
        oom_kills: 0,
        size: vm.map(|vm| VmSize::of(&config, vm)),
        image_slots: vm.map(|vm| vm.image_slots),
        boot: BootTimes::default(),
        problem: String::new(),
        config,
    }
}

/// Gives back everything of a pod that did not start. What cannot be given back now
/// is its client's to stop and remove.
async fn undo(node: &Node, sandbox: &SandboxOp<'_>, name: Reservation<'_>) -> Result<(), Error> {
    if let Err(undo) = lifecycle::stop(node, sandbox).await {
        let undo = chain(&undo);
        tracing::warn!(
            error = undo,
            "failed to undo a pod that did not start; its client can stop and remove it"
        );
        node.registry.add_sandbox(Arc::clone(sandbox));
        name.keep();
        return Ok(());
    }
    lifecycle::forget(node, sandbox).await
}

/// Starts what the pod runs in, tells its agent what it is, and records it.
async fn bring_up(node: &Arc<Node>, sandbox: &SandboxOp<'_>, handler: &Handler) -> Result<(), Error> {
    let begun = Instant::now();
    let record = sandbox.record();
    let config = &record.config;
    // In the host's network there is nothing to map.
    let mappings = if husk_oci::host_network(config) { Vec::new() } else { port_mappings(config)? };
    let plan = StartPlan {
        place: sandbox.place(&node.config.run_dir),
        handler,
        config,
        network: pod_ref(&record, &mappings, handler)?,
        limits: check_sandbox::limits(config, handler)?,
        scratch: sandbox.scratch(),
        layers: sandbox.layers(),
    };
    let started = husk_backend::start(node.services(), &plan).await?;

    let configuring = Instant::now();
    let running = Arc::new(started.running);
    let mut request = started.request;
    request.sandbox_id = sandbox.id.to_string();
    request.sysctls = config.linux.as_ref().map(|linux| linux.sysctls.clone()).unwrap_or_default();
    request.shared_pid_namespace = husk_oci::shares_pid_namespace(config);
    request.user_namespace = husk_oci::user_namespace(config)?;
    running.agent.call("configure sandbox", async |mut agent| agent.create_sandbox(request).await).await?;

    let boot = BootTimes {
        network: millis(started.times.network),
        vmm: millis(started.times.vmm),
        kernel: millis(started.times.kernel),
        agent: millis(started.times.agent),
        configure: millis(configuring.elapsed()),
        total: millis(begun.elapsed()),
    };
    sandbox.set_running(Some(running.clone()));
    sandbox
        .update(|record| {
            record.phase = Phase::Ready;
            record.ips = started.ips.iter().map(ToString::to_string).collect();
            record.netns = started.netns;
            record.vmm_pid = started.pid;
            record.oom_kills = record.cgroup.as_deref().map_or(0, cgroup::oom_kills);
            record.boot = boot;
        })
        .await?;
    lifecycle::watch(sandbox, &running);
    tracing::info!(
        pod = names::sandbox(config),
        kind = ?record.kind,
        network_ms = boot.network,
        vmm_exec_ms = boot.vmm,
        kernel_to_agent_ms = boot.kernel,
        agent_ready_ms = boot.agent,
        sandbox_configured_ms = boot.configure,
        total_ms = boot.total,
        cloned = started.cloned,
        "pod ready"
    );
    Ok(())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The pod as its network needs to know it.
fn pod_ref<'a>(
    record: &'a SandboxRecord,
    port_mappings: &'a [PortMapping],
    handler: &Handler,
) -> Result<PodRef<'a>, Error> {
    let (name, namespace, uid) = record
        .config
        .metadata
        .as_ref()
        .map(|pod| (pod.name.as_str(), pod.namespace.as_str(), pod.uid.as_str()))
        .unwrap_or_default();
    let bandwidth = check_sandbox::bandwidth(&record.config)?;
    let sandbox_id = record.id.as_str();
    let filtered = handler.vm().is_some_and(|vm| vm.network_filter);
    Ok(PodRef { sandbox_id, namespace, name, uid, port_mappings, bandwidth, filtered })
}

fn port_mappings(config: &cri::PodSandboxConfig) -> Result<Vec<PortMapping>, Error> {
    let wrong = |what: &str, value: &dyn std::fmt::Display| Error::Invalid(format!("{what} `{value}`"));
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
