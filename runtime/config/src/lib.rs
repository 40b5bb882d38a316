//! What huskd can be told: `/etc/husk/config.toml`, every key optional.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use husk_vmm_api::RateLimit;
use serde::{Deserialize, Serialize};

#[cfg(test)]
mod reference;

/// The whole file.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Config {
    /// The CRI server's unix socket.
    pub socket: PathBuf,
    /// What must survive a reboot: images, sandbox records, network leases.
    pub state_dir: PathBuf,
    /// What must not: sockets, logs of the VMMs.
    pub run_dir: PathBuf,
    /// The runtime handler that an empty `runtime_handler` selects.
    pub default_handler: String,
    /// CNI.
    pub network: Network,
    /// Images.
    pub images: Images,
    /// Exec, attach and port-forward.
    pub streaming: Streaming,
    /// Devices by name.
    pub cdi: Cdi,
    /// Runtime handlers by name.
    pub handlers: BTreeMap<String, Handler>,
}

/// `[network]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Network {
    /// Where CNI configurations are.
    pub conf_dir: PathBuf,
    /// Where CNI plugins are, searched in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// Most seconds that one plugin may take.
    pub plugin_timeout_seconds: u64,
}

/// `[images]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Images {
    /// Registries spoken to over plain HTTP, `host` or `host:port`. Loopback
    /// addresses always are.
    pub insecure_registries: Vec<String>,
    /// Hosts that a registry may send huskd to for a token, password included, and for
    /// content, though their addresses are more private than the registry's or their
    /// domain is another.
    pub trusted_hosts: Vec<String>,
    /// Where `<host>/hosts.toml` name mirrors, as containerd reads them. It
    /// can be containerd's own `/etc/containerd/certs.d`.
    pub hosts_dir: PathBuf,
    /// Most seconds without a byte before a pull is given up.
    pub stall_timeout_seconds: u64,
    /// Most seconds that a pull may take in all.
    pub pull_timeout_seconds: u64,
    /// MiB that stay free on the images' disk: a pull that would leave less fails.
    pub min_free_mib: u64,
    /// Most pulls at a time; others wait.
    pub parallel_pulls: usize,
    /// Most images that are unpacked at a time; other pulls wait.
    pub parallel_unpacks: usize,
    /// Tags or digests, as `crictl images` tells them, of images that clients
    /// are asked not to remove to free space.
    pub pinned: Vec<String>,
}

/// `[streaming]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Streaming {
    /// Where clients of exec, attach and port-forward connect; port 0 is one
    /// that the kernel chooses. Whoever can reach it still needs the secret in
    /// the URL, but is not asked for more, and nothing is encrypted.
    pub address: SocketAddr,
}

/// `[cdi]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Cdi {
    /// Where CDI files are; a device in a later directory counts more.
    pub dirs: Vec<PathBuf>,
}

/// What a pod of a handler lives in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A virtual machine of its own.
    #[default]
    Vm,
    /// Namespaces of the host.
    Host,
}

/// `[handlers.NAME]`: one kind of pod.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Handler {
    /// What its pods live in: a virtual machine, or, for the handler `runc`
    /// unless it says otherwise, the host.
    pub kind: Option<Kind>,
    /// Whether requests may name it.
    pub enabled: bool,
    /// Host pods: the `husk-agent` program, their supervisor.
    pub agent: PathBuf,
    /// Host pods: the OCI runtime.
    pub runc: PathBuf,
    /// Host pods: the binary policy with AppArmor's profile `husk-default`.
    pub apparmor_policy: PathBuf,
    /// The `husk-vmm` program.
    pub vmm: PathBuf,
    /// The `husk-fs` program.
    pub file_server: PathBuf,
    /// The guest's kernel, an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's root filesystem, an EROFS image.
    pub rootfs: PathBuf,
    /// vCPUs of a pod that asks for none.
    pub vcpus: u8,
    /// Guest memory that every pod has, MiB; a pod's memory limit is added.
    pub memory_mib: u32,
    /// Size of the pod's writable disk, MiB. It takes what is written to it.
    pub disk_mib: u64,
    /// How many different images one pod can use at once.
    pub image_slots: u8,
    /// Most seconds from the guest's start to the agent's first word. The VMM's
    /// own start has a limit of its own.
    pub boot_timeout_seconds: u64,
    /// Most seconds that the agent may take for one request.
    pub agent_timeout_seconds: u64,
    /// Added to the guest kernel's command line.
    pub kernel_cmdline: String,
    /// Machines are clones of one that has booted, see
    /// `runtime/vm/src/template.rs`; otherwise each boots.
    pub template: bool,
    /// Directories of the host below which a pod's volumes are trusted: its machine
    /// may leave device nodes and programs with set-ID bits or capabilities there.
    pub trusted_volumes: Vec<PathBuf>,
    /// How much a pod may do in a second.
    pub limits: Limits,
    /// Whether frames that a guest sends in the name of others (another MAC,
    /// another address, a router) are dropped at its tap.
    pub network_filter: bool,
    /// Hooks of every container.
    pub hooks: Hooks,
}

/// `[handlers.NAME.limits]`: token buckets of each device of a machine; without
/// one there is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Limits {
    /// Packets to the pod.
    pub network_in: Option<RateLimit>,
    /// Packets from the pod.
    pub network_out: Option<RateLimit>,
    /// The writable disk, and each image disk by itself.
    pub disk: Option<RateLimit>,
}

/// `[handlers.NAME.hooks]`: hooks of the OCI runtime-spec, which run where the
/// container is. For a guest their programs are files of the host, linked
/// statically; those of `start_container` are always the container's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Hooks {
    /// Before the container's namespaces are set up; deprecated by the spec.
    pub prestart: Vec<Hook>,
    /// The same, in the machine's namespaces.
    pub create_runtime: Vec<Hook>,
    /// The same, in the container's namespaces.
    pub create_container: Vec<Hook>,
    /// Before the container's program, inside the container.
    pub start_container: Vec<Hook>,
    /// After it has started.
    pub poststart: Vec<Hook>,
    /// After the container has been deleted: by its client, or by the end of its
    /// pod, where all of them together have 20 seconds.
    pub poststop: Vec<Hook>,
}

impl Hooks {
    /// Every one of them.
    fn all(&self) -> impl Iterator<Item = &Hook> {
        let lists = [
            &self.prestart,
            &self.create_runtime,
            &self.create_container,
            &self.start_container,
            &self.poststart,
            &self.poststop,
        ];
        lists.into_iter().flatten()
    }
}

/// One hook.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Hook {
    /// The program.
    pub path: PathBuf,
    /// Its arguments, its own name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its variables, `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Most seconds that it may take.
    #[serde(default)]
    pub timeout_seconds: Option<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: "/run/husk/husk.sock".into(),
            state_dir: "/var/lib/husk".into(),
            run_dir: "/run/husk".into(),
            default_handler: DEFAULT_HANDLER.into(),
            network: Network::default(),
            images: Images::default(),
            streaming: Streaming::default(),
            cdi: Cdi::default(),
            handlers: [DEFAULT_HANDLER, HOST_HANDLER].map(built_in).into(),
        }
    }
}

/// The handler that exists without a configuration file.
pub const DEFAULT_HANDLER: &str = "kata-runtime";

/// The handler of host pods that exists without a configuration file.
pub const HOST_HANDLER: &str = "runc";

/// A handler as it is when the configuration file does not mention it.
fn built_in(name: &str) -> (String, Handler) {
    (name.to_owned(), Handler { kind: Some(Kind::of(name)), ..Handler::default() })
}

impl Kind {
    /// Of a handler that does not say.
    fn of(name: &str) -> Self {
        if name == HOST_HANDLER { Self::Host } else { Self::Vm }
    }
}

impl Handler {
    /// What its pods live in.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind.unwrap_or_default()
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            plugin_timeout_seconds: 60,
        }
    }
}

impl Default for Images {
    fn default() -> Self {
        Self {
            insecure_registries: Vec::new(),
            trusted_hosts: Vec::new(),
            hosts_dir: "/etc/husk/certs.d".into(),
            stall_timeout_seconds: 60,
            pull_timeout_seconds: 900,
            min_free_mib: 256,
            parallel_pulls: 8,
            parallel_unpacks: 2,
            pinned: Vec::new(),
        }
    }
}

impl Default for Streaming {
    fn default() -> Self {
        Self { address: (Ipv4Addr::LOCALHOST, 0).into() }
    }
}

impl Default for Cdi {
    fn default() -> Self {
        Self { dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()] }
    }
}

impl Default for Handler {
    fn default() -> Self {
        Self {
            kind: None,
            enabled: true,
            agent: installed("libexec/husk/husk-agent"),
            runc: "runc".into(),
            apparmor_policy: installed("share/husk/husk-default.apparmor"),
            vmm: installed("libexec/husk/husk-vmm"),
            file_server: installed("libexec/husk/husk-fs"),
            kernel: installed("share/husk/vmlinux"),
            rootfs: installed("share/husk/rootfs.erofs"),
            vcpus: 1,
            memory_mib: 256,
            disk_mib: 10 * 1024,
            image_slots: 8,
            boot_timeout_seconds: 60,
            agent_timeout_seconds: 60,
            kernel_cmdline: String::new(),
            template: true,
            trusted_volumes: vec!["/".into()],
            limits: Limits::default(),
            network_filter: true,
            hooks: Hooks::default(),
        }
    }
}

/// A file installed under the same prefix as the running program.
fn installed(path: &str) -> PathBuf {
    let prefix = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().and_then(Path::parent).map(Path::to_path_buf))
        .unwrap_or_else(|| "/usr/local".into());
    prefix.join(path)
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("read {path}: {cause}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The file is not the TOML that is expected.
    #[error("{path}: {cause}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        cause: Box<toml::de::Error>,
    },
    /// A value that cannot work.
    #[error("{path}: {problem}")]
    Value {
        /// Which file.
        path: PathBuf,
        /// Which key, and what it may be.
        problem: String,
    },
}

impl Config {
    /// Reads `path`; without that file, everything has its default.
    ///
    /// # Errors
    /// A file that is there and cannot be used.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(cause) => return Err(Error::Read { path: path.into(), cause }),
        };
        let mut config: Self = toml::from_str(&text)
            .map_err(|cause| Error::Parse { path: path.into(), cause: Box::new(cause) })?;
        config.complete();
        config.check().map_err(|problem| Error::Value { path: path.into(), problem })?;
        Ok(config)
    }

    /// A file that changes one handler leaves the others as they are.
    fn complete(&mut self) {
        for (name, handler) in [DEFAULT_HANDLER, HOST_HANDLER].map(built_in) {
            self.handlers.entry(name).or_insert(handler);
        }
        for (name, handler) in &mut self.handlers {
            handler.kind.get_or_insert(Kind::of(name));
        }
        self.handlers.retain(|_, handler| handler.enabled);
    }

    fn check(&self) -> Result<(), String> {
        if !self.handlers.contains_key(&self.default_handler) {
            return Err(format!(
                "default_handler `{}` is not among [handlers] that are enabled",
                self.default_handler
            ));
        }
        if self.streaming.address.ip().is_unspecified() {
            return Err("streaming.address must be one that clients can connect to, not all of them".into());
        }
        for (name, handler) in &self.handlers {
            if !(1..=64).contains(&handler.vcpus) {
                return Err(format!("handlers.{name}.vcpus must be 1 to 64"));
            }
            if handler.memory_mib < 96 {
                return Err(format!("handlers.{name}.memory_mib must be 96 or more"));
            }
            if !(1..=12).contains(&handler.image_slots) {
                return Err(format!("handlers.{name}.image_slots must be 1 to 12"));
            }
            if let Some(path) = handler.hooks.all().map(|hook| &hook.path).find(|path| !path.is_absolute()) {
                return Err(format!("handlers.{name}.hooks: path `{}` is not absolute", path.display()));
            }
            if let Some(path) = handler.trusted_volumes.iter().find(|path| !path.is_absolute()) {
                let path = path.display();
                return Err(format!("handlers.{name}.trusted_volumes: path `{path}` is not absolute"));
            }
            if handler.disk_mib < 16 {
                return Err(format!("handlers.{name}.disk_mib must be 16 or more"));
            }
        }
        Ok(())
    }

    /// The handler that a request names, with its name; `""` is the default.
    #[must_use]
    pub fn handler(&self, name: &str) -> Option<(&str, &Handler)> {
        let name = if name.is_empty() { &self.default_handler } else { name };
        self.handlers.get_key_value(name).map(|(name, handler)| (name.as_str(), handler))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(file.path())
    }

    #[test]
    fn the_empty_handler_is_the_default_and_unknown_ones_are_none() {
        let config = Config::default();
        assert_eq!(config.handler("").unwrap().0, "kata-runtime");
        assert!(config.handler("kata").is_none());
    }

    #[test]
    fn a_file_changes_what_it_names_and_nothing_else() {
        let config =
            load("socket = '/tmp/x.sock'\n[handlers.small]\nmemory_mib = 128\n[handlers.kata-runtime]\n")
                .unwrap();
        assert_eq!(config.socket, Path::new("/tmp/x.sock"));
        assert_eq!(config.handler("small").unwrap().1.memory_mib, 128);
        assert_eq!(config.state_dir, Path::new("/var/lib/husk"));
    }

    #[test]
    fn host_pods_have_a_handler_unless_it_is_taken_away() {
        for text in ["", "[handlers.kata-runtime]\nvcpus = 2", "[handlers.runc]\nrunc = '/opt/runc'"] {
            let config = load(text).unwrap();
            assert_eq!(config.handler("runc").unwrap().1.kind(), Kind::Host, "{text}");
            assert_eq!(config.handler("").unwrap().1.kind(), Kind::Vm, "{text}");
        }
        assert_eq!(
            load("[handlers.plain]\nkind = 'host'").unwrap().handler("plain").unwrap().1.kind(),
            Kind::Host
        );
        assert!(load("[handlers.runc]\nenabled = false").unwrap().handler("runc").is_none());
        assert!(load("[handlers.kata-runtime]\nenabled = false").is_err(), "it is the default");
        assert!(load("[handlers.runc]\nkind = 'jail'").is_err());
    }

    #[test]
    fn limits_are_set_by_device_and_off_by_default() {
        let config = load(
            "[handlers.kata-runtime.limits]\nnetwork_out = { bytes_per_second = 1000, bytes_burst = 5 }",
        )
        .unwrap();
        let limits = &config.handler("").unwrap().1.limits;
        let network_out = RateLimit { bytes_per_second: 1000, bytes_burst: 5, ..RateLimit::default() };
        assert_eq!(limits, &Limits { network_out: Some(network_out), ..Limits::default() });
        assert_eq!(config.handler("runc").unwrap().1.limits, Limits::default());
    }

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        for (text, name) in [
            ("sokcet = 'x'", "sokcet"),
            ("[handlers.kata-runtime]\nvcpus = 65", "vcpus"),
            ("[handlers.kata-runtime]\nmemory_mib = 1", "memory_mib"),
            ("default_handler = 'none'", "none"),
            ("[streaming]\naddress = '0.0.0.0:1'", "streaming.address"),
            ("[[handlers.kata-runtime.hooks.poststop]]\npath = 'relative'", "relative"),
            ("[[handlers.kata-runtime.hooks.sometime]]\npath = '/x'", "sometime"),
            ("[handlers.kata-runtime]\ntrusted_volumes = ['srv']", "trusted_volumes"),
            ("[handlers.kata-runtime.limits.disk]\nbytes = 1", "bytes"),
        ] {
            let message = load(text).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
    }

    #[test]
    fn what_counts_is_told_as_clients_of_other_runtimes_expect_it() {
        let config = load("state_dir = '/srv/husk'\n[network]\nconf_dir = '/srv/net.d'").unwrap();
        let told = serde_json::to_value(&config).unwrap();
        assert_eq!(told["stateDir"], "/srv/husk");
        assert_eq!(told["network"]["confDir"], "/srv/net.d");
        assert_eq!(told["handlers"]["runc"]["kind"], "host");
        assert_eq!(told["handlers"]["kata-runtime"]["memoryMib"], 256);
    }

    #[test]
    fn no_file_is_no_error() {
        assert!(Config::load(Path::new("/nonexistent/husk.toml")).is_ok());
    }
}
