//! `[handlers.NAME]`: runtime handlers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_vmm_api::RateLimit;
use serde::{Deserialize, Serialize};

use crate::Hooks;

/// The handler of VMs that exists without a configuration file.
pub const DEFAULT_HANDLER: &str = "kata-runtime";

/// The handler of host pods that exists without a configuration file.
pub const HOST_HANDLER: &str = "runc";

/// The backend of a handler's pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A virtual machine for each pod.
    #[default]
    Vm,
    /// Namespaces of the host.
    Host,
}

impl Kind {
    /// The kind of the handler `name` if its table does not say another.
    pub(crate) fn of(name: &str) -> Self {
        if name == HOST_HANDLER { Self::Host } else { Self::Vm }
    }
}

/// A runtime handler that is enabled.
///
/// The handler's table in the file is flat: `read` chooses the variant by `kind`, or by the handler's
/// name, and refuses keys of the other one.
#[expect(clippy::large_enum_variant, reason = "a node has a few handlers")]
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Handler {
    /// Each pod has a virtual machine.
    Vm(VmHandler),
    /// The containers of a pod are plain containers of the host.
    Host(HostHandler),
}

/// The keys of a handler whose pods have virtual machines.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct VmHandler {
    /// The `husk-vmm` program.
    pub vmm: PathBuf,
    /// The `husk-fs` program.
    pub file_server: PathBuf,
    /// The guest's kernel, an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's root file system, an EROFS image.
    pub rootfs: PathBuf,
    /// vCPUs of a pod without a CPU limit.
    pub vcpus: u8,
    /// Guest memory that every pod has, MiB; a pod's memory limit is added.
    pub memory_mib: u32,
    /// Size of the sandbox disk, MiB. The file takes the space that is written.
    pub disk_mib: u64,
    /// How many different images one pod can use at once.
    pub image_slots: u8,
    /// The longest time from the guest's start until its agent is ready, seconds. The start of
    /// the VMM itself has a limit of its own.
    pub boot_timeout_seconds: u64,
    /// The longest time that the agent may take for one request, seconds.
    pub agent_timeout_seconds: u64,
    /// Text that is added to the guest kernel's command line.
    pub kernel_cmdline: String,
    /// Whether VMs are clones of one that has booted, see `runtime/vm/src/template.rs`;
    /// otherwise each boots.
    pub template: bool,
    /// Directories of the host below which a pod's volumes are trusted: the pod may leave device
    /// nodes there, and programs with set-ID bits or capabilities.
    pub trusted_volumes: Vec<PathBuf>,
    /// How much a pod may do in a second.
    pub limits: Limits,
    /// Whether frames that a guest sends in the name of others (another MAC,
    /// another address, a router) are dropped at its tap.
    pub network_filter: bool,
    /// Hooks of every container.
    pub hooks: Hooks,
}

/// The keys of a handler whose pods are host pods.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct HostHandler {
    /// The `husk-agent` program, which supervises a pod.
    pub agent: PathBuf,
    /// The OCI runtime: a path, or a name that is looked up on the `PATH`.
    pub runc: PathBuf,
    /// The compiled AppArmor policy with the profile `husk-default`.
    pub apparmor_policy: PathBuf,
    /// The longest time that the agent may take for one request, seconds.
    pub agent_timeout_seconds: u64,
    /// Hooks of every container.
    pub hooks: Hooks,
}

/// `[handlers.NAME.limits]`: token buckets of each device of a VM; without
/// one there is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Limits {
    /// Packets to the pod.
    pub network_in: Option<RateLimit>,
    /// Packets from the pod.
    pub network_out: Option<RateLimit>,
    /// Requests to the sandbox disk, and to each image disk by itself.
    pub disk: Option<RateLimit>,
    /// Requests that make the sandbox disk durable; operations only.
    pub flush: Option<RateLimit>,
    /// Requests for files of volumes.
    pub volumes: Option<RateLimit>,
    /// Packets that the VM sends to huskd: answers of the agent, output of containers,
    /// forwarded ports.
    pub vsock: Option<RateLimit>,
    /// Bytes of the guest's console that are kept; bytes only.
    pub console: Option<RateLimit>,
}

/// The handlers that exist without a configuration file.
pub(crate) fn built_in() -> BTreeMap<String, Handler> {
    [DEFAULT_HANDLER, HOST_HANDLER].map(|name| (name.to_owned(), Handler::default_of(Kind::of(name)))).into()
}

impl Handler {
    /// A handler of this kind that no file changes.
    #[must_use]
    pub fn default_of(kind: Kind) -> Self {
        match kind {
            Kind::Vm => Self::Vm(VmHandler::default()),
            Kind::Host => Self::Host(HostHandler::default()),
        }
    }

    /// The backend of the handler's pods.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Vm(_) => Kind::Vm,
            Self::Host(_) => Kind::Host,
        }
    }

    /// The keys of a handler of VMs; none of another.
    #[must_use]
    pub const fn vm(&self) -> Option<&VmHandler> {
        match self {
            Self::Vm(vm) => Some(vm),
            Self::Host(_) => None,
        }
    }

    /// The keys of a handler of host pods; none of another.
    #[must_use]
    pub const fn host(&self) -> Option<&HostHandler> {
        match self {
            Self::Vm(_) => None,
            Self::Host(host) => Some(host),
        }
    }

    /// Hooks of every container.
    #[must_use]
    pub const fn hooks(&self) -> &Hooks {
        match self {
            Self::Vm(VmHandler { hooks, .. }) | Self::Host(HostHandler { hooks, .. }) => hooks,
        }
    }

    /// The longest time that the agent of a pod may take for one request.
    #[must_use]
    pub const fn agent_timeout(&self) -> Duration {
        let (Self::Vm(VmHandler { agent_timeout_seconds: seconds, .. })
        | Self::Host(HostHandler { agent_timeout_seconds: seconds, .. })) = self;
        Duration::from_secs(*seconds)
    }

    /// Refuses values that cannot work, with the key below the handler's table.
    pub(crate) fn check(&self) -> Result<(), String> {
        if let Some(path) = self.hooks().all().map(|hook| &hook.path).find(|path| !path.is_absolute()) {
            return Err(format!("hooks: path `{}` is not absolute", path.display()));
        }
        self.vm().map_or(Ok(()), VmHandler::check)
    }
}

impl VmHandler {
    fn check(&self) -> Result<(), String> {
        if !(1..=64).contains(&self.vcpus) {
            return Err("vcpus must be 1 to 64".into());
        }
        if self.memory_mib < 96 {
            return Err("memory_mib must be 96 or more".into());
        }
        if !(1..=12).contains(&self.image_slots) {
            return Err("image_slots must be 1 to 12".into());
        }
        if let Some(path) = self.trusted_volumes.iter().find(|path| !path.is_absolute()) {
            return Err(format!("trusted_volumes: path `{}` is not absolute", path.display()));
        }
        if self.disk_mib < 16 {
            return Err("disk_mib must be 16 or more".into());
        }
        self.limits.check().map_err(|problem| format!("limits.{problem}"))
    }
}

/// The default of `agent_timeout_seconds`, seconds.
const AGENT_TIMEOUT: u64 = 60;

impl Default for VmHandler {
    fn default() -> Self {
        Self {
            vmm: installed("libexec/husk/husk-vmm"),
            file_server: installed("libexec/husk/husk-fs"),
            kernel: installed("share/husk/vmlinux"),
            rootfs: installed("share/husk/rootfs.erofs"),
            vcpus: 1,
            memory_mib: 256,
            disk_mib: 10 * 1024,
            image_slots: 8,
            boot_timeout_seconds: 60,
            agent_timeout_seconds: AGENT_TIMEOUT,
            kernel_cmdline: String::new(),
            template: true,
            trusted_volumes: vec!["/".into()],
            limits: Limits::default(),
            network_filter: true,
            hooks: Hooks::default(),
        }
    }
}

impl Default for HostHandler {
    fn default() -> Self {
        Self {
            agent: installed("libexec/husk/husk-agent"),
            runc: "runc".into(),
            apparmor_policy: installed("share/husk/husk-default.apparmor"),
            agent_timeout_seconds: AGENT_TIMEOUT,
            hooks: Hooks::default(),
        }
    }
}

/// A file installed under the same prefix as the running program.
pub(crate) fn installed(path: &str) -> PathBuf {
    let prefix = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().and_then(Path::parent).map(Path::to_path_buf))
        .unwrap_or_else(|| "/usr/local".into());
    prefix.join(path)
}
