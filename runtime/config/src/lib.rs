//! The configuration of huskd: `/etc/husk/config.toml`, every key optional.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

mod handler;
mod hooks;
mod limits;
mod read;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

pub use handler::{DEFAULT_HANDLER, HOST_HANDLER, Handler, HostHandler, Kind, Limits, VmHandler};
pub use hooks::{Hook, Hooks};
use read::Problem;

/// The configuration file.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Config {
    /// The CRI server's unix socket.
    pub socket: PathBuf,
    /// The directory of all that must survive a reboot: images, sandbox records, network leases.
    pub state_dir: PathBuf,
    /// The directory of all that must not survive it: sockets, logs of the VMMs.
    pub run_dir: PathBuf,
    /// The runtime handler that an empty `runtime_handler` selects.
    pub default_handler: String,
    /// The maker of control groups, and the form of a pod's parent group.
    pub cgroup_driver: CgroupDriver,
    /// Networks of pods.
    pub network: Network,
    /// Registries, pulls and the image store.
    pub images: Images,
    /// The server of exec, attach and port-forward.
    pub streaming: Streaming,
    /// Devices that requests name, from CDI specifications.
    pub cdi: Cdi,
    /// Runtime handlers that are enabled, by name.
    #[serde(skip_deserializing)]
    pub handlers: BTreeMap<String, Handler>,
}

/// The maker of the control groups of pods. It must be what the kubelet's `cgroupDriver` is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// huskd: a pod's parent is a path of the cgroup file system.
    #[default]
    Cgroupfs,
    /// systemd, asked over D-Bus: a pod's parent is a slice, and its group is a scope.
    Systemd,
}

/// `[network]`: networks of pods.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Network {
    /// The directory of CNI configurations.
    pub conf_dir: PathBuf,
    /// Directories of CNI plugins, searched in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// The longest time that one plugin may take, seconds.
    pub plugin_timeout_seconds: u64,
}

/// `[images]`: registries, pulls and the image store.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Images {
    /// Registries, `host` or `host:port`, that huskd speaks to over plain HTTP, as it always
    /// does with loopback addresses.
    pub insecure_registries: Vec<String>,
    /// Hosts that a registry may send huskd to for a token, password included, and for
    /// content, though their addresses are more private than the registry's or their
    /// domain is another.
    pub trusted_hosts: Vec<String>,
    /// The directory of `<host>/hosts.toml`, which name mirrors as containerd reads them. The
    /// directory can be containerd's own `/etc/containerd/certs.d`.
    pub hosts_dir: PathBuf,
    /// The longest time without a byte before a pull is given up, seconds.
    pub stall_timeout_seconds: u64,
    /// The longest time that a whole pull may take, seconds.
    pub pull_timeout_seconds: u64,
    /// MiB that stay free on the images' disk: a pull that would leave less fails.
    pub min_free_mib: u64,
    /// How many pulls run at a time; others wait.
    pub parallel_pulls: usize,
    /// How many images are unpacked at a time; other pulls wait.
    pub parallel_unpacks: usize,
    /// Tags or digests, as `crictl images` shows them, of images that clients
    /// are asked not to remove to free space.
    pub pinned: Vec<String>,
}

/// `[streaming]`: the server of exec, attach and port-forward.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Streaming {
    /// The TCP address to which clients of exec, attach and port-forward connect; port 0 is one
    /// that the kernel chooses. A client that can reach it still needs the secret in
    /// the URL, but is not asked for more, and nothing is encrypted.
    pub address: SocketAddr,
}

/// `[cdi]`: devices that requests name.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all(serialize = "camelCase"))]
pub struct Cdi {
    /// Directories of CDI specifications; a device in a later directory replaces one of the same
    /// name.
    pub dirs: Vec<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: "/run/husk/husk.sock".into(),
            state_dir: "/var/lib/husk".into(),
            run_dir: "/run/husk".into(),
            default_handler: DEFAULT_HANDLER.into(),
            cgroup_driver: CgroupDriver::default(),
            network: Network::default(),
            images: Images::default(),
            streaming: Streaming::default(),
            cdi: Cdi::default(),
            handlers: handler::built_in(),
        }
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

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The file is not the TOML that is expected.
    #[error("read the configuration {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The place in it, and what is wrong there.
        source: Box<toml::de::Error>,
    },
    /// A key or a value cannot work.
    #[error("read the configuration {path}: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, and what it may be.
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
            Err(source) => return Err(Error::Read { path: path.into(), source }),
        };
        read::config(&text).map_err(|problem| match problem {
            Problem::Parse(source) => Error::Parse { path: path.into(), source },
            Problem::Value(problem) => Error::Value { path: path.into(), problem },
        })
    }

    /// Refuses values that cannot work, with the key.
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
            handler.check().map_err(|problem| format!("handlers.{name}.{problem}"))?;
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
