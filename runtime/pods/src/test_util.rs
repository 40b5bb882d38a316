//! A node that is a folder, and pods of which there are records alone, for tests.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_agent_client::Agent;
use husk_backend::{Backend, ImageDisks, RunningPod, VmSize};
use husk_base::id::{ContainerId, SandboxId};
use husk_config::{Config, DEFAULT_HANDLER, HOST_HANDLER, Kind, Network, Streaming};
use husk_proto::cri;
use husk_vm::{Control, Process, Vmm};

use crate::Node;
use crate::model::{BootTimes, Container, ContainerRecord, Events, Phase, Sandbox, SandboxRecord, State};

/// A node without a network or a VM.
#[must_use]
pub fn node(folder: &Path) -> Arc<Node> {
    Arc::new(Node::open(config(folder)).unwrap())
}

/// The configuration of such a node.
#[must_use]
pub fn config(folder: &Path) -> Config {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let network = Network { conf_dir: folder.join("net.d"), ..Default::default() };
    let streaming = Streaming { address: ([127, 0, 0, 1], 0).into() };
    let (state_dir, run_dir) = (folder.join("state"), folder.join("run"));
    Config { state_dir, run_dir, network, streaming, ..Default::default() }
}

fn record(id: SandboxId, kind: Kind, phase: Phase) -> SandboxRecord {
    let handler = if kind == Kind::Host { HOST_HANDLER } else { DEFAULT_HANDLER };
    SandboxRecord {
        id,
        config: cri::PodSandboxConfig::default(),
        handler: handler.into(),
        kind,
        created_at: 1,
        phase,
        ips: Vec::new(),
        netns: PathBuf::new(),
        vmm_pid: 0,
        cgroup: None,
        oom_kills: 0,
        size: None,
        image_slots: None,
        boot: BootTimes::default(),
        problem: String::new(),
    }
}

/// The record of a pod that is ready.
#[must_use]
pub fn sandbox_record(id: &str) -> SandboxRecord {
    let size = Some(VmSize { vcpus: 1, memory_mib: 256 });
    SandboxRecord { size, ..record(id.into(), Kind::Vm, Phase::Ready) }
}

/// The record of a container that runs.
#[must_use]
pub fn container_record(id: &str, sandbox: &str) -> ContainerRecord {
    ContainerRecord {
        id: ContainerId::from(id),
        sandbox_id: SandboxId::from(sandbox),
        config: cri::ContainerConfig::default(),
        image_id: String::new(),
        image_tag: String::new(),
        image_ref: String::new(),
        image_slot: String::new(),
        image_rootfs: PathBuf::new(),
        image_volumes: Vec::new(),
        volumes: Vec::new(),
        log_path: PathBuf::new(),
        stop_signal: 15,
        guest_pid: 1,
        created_at: 1,
        started_at: 2,
        user: None,
        start_error: String::new(),
        poststop: false,
        state: State::Running,
    }
}

/// A pod that is ready, and a container that runs, to be added to it.
pub async fn running(folder: &Path, id: &str, events: Events) -> (Arc<Sandbox>, Arc<Container>) {
    let sandbox = Arc::new(Sandbox::create(folder.join(id), sandbox_record(id), events).await.unwrap());
    let record = container_record(&format!("c-of-{id}"), id);
    let container = Arc::new(Container::create(sandbox.directory(), record).await.unwrap());
    (sandbox, container)
}

/// A pod that runs of which nothing is there but the agent.
#[must_use]
pub fn pod_of(agent: Agent) -> Arc<RunningPod> {
    // This very process stands for its VMM: it does not end before the test.
    let process = Process::open(std::process::id()).unwrap();
    let nowhere = Path::new("/nowhere");
    let backend = Backend::Vm(Vmm::new(Control::new(nowhere.join("vmm.sock")), process, nowhere));
    Arc::new(RunningPod { backend, agent, disks: ImageDisks::unlimited() })
}

/// A sandbox of which there is a record and nothing else.
pub async fn sandbox(node: &Node, kind: Kind, phase: Phase) -> Arc<Sandbox> {
    let id = SandboxId::random();
    let cgroup = Some(node.config.run_dir.join("no-such-group"));
    let record = SandboxRecord { cgroup, ..record(id.clone(), kind, phase) };
    let directory = node.sandboxes_dir().join(id.as_str());
    Arc::new(Sandbox::create(directory, record, node.events.clone()).await.unwrap())
}

/// A container of it, by its record.
pub async fn container(sandbox: &Sandbox, state: State) -> Arc<Container> {
    let id = ContainerId::random();
    let record = ContainerRecord {
        image_slot: "image-0".into(),
        state,
        ..container_record(id.as_str(), sandbox.id.as_str())
    };
    Arc::new(Container::create(sandbox.directory(), record).await.unwrap())
}
