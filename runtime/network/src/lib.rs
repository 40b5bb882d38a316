//! The pod's network: a netns, CNI, and taps that join it to the machine.
//!
//! ```text
//!   host            pod's netns                        VM
//!   cni0 ── veth ── eth0 ──── tc redirect ──▶─ tap0_husk ── virtio-net (eth0)
//!                        ─◀── tc filter  ────
//! ```
//!
//! [`Network::attach`] writes down what it is about to do ([`record`]), makes
//! the namespace ([`netns`]), has the CNI plugins connect it ([`cni`],
//! [`plugin`]), and joins what they made to taps ([`guest`], [`tap`]).
//! [`Network::detach`] works from what was written down alone: after a crash,
//! a reboot, or a change of `/etc/cni/net.d` it disconnects the pod with the
//! configuration that had connected it.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::oneshot;

mod arguments;
pub mod cni;
pub mod conflist;
mod filter;
pub mod guest;
pub mod netns;
pub mod plugin;
pub mod record;
pub mod resolv_conf;
pub mod result;
pub mod tap;
mod tc;

/// A tap in a network namespace of its own that nothing else is in, for a
/// machine that is no pod. Both end with the tap's last descriptor.
///
/// # Errors
/// The kernel's.
pub async fn unconnected_tap() -> Result<OwnedFd, Error> {
    Ok(netns::run_in_new(guest::main_tap).await??)
}

#[cfg(test)]
mod tests;

pub use arguments::rate;
use conflist::NetworkList;
use plugin::{Plugins, Target};
use record::{Intent, Recorded, Records};

/// The interface that CNI plugins are asked for.
const INTERFACE: &str = "eth0";

/// Where things are, and how long plugins may take.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// CNI network configurations, `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// CNI plugins, `/opt/cni/bin` and `/usr/lib/cni`.
    pub bin_dirs: Vec<PathBuf>,
    /// Records of connected pods. On a disk that survives a reboot, since so
    /// do the leases of IPAM plugins.
    pub cache_dir: PathBuf,
    /// For one call of one plugin.
    pub plugin_timeout: Duration,
}

/// A pod to connect.
#[derive(Clone, Copy, Debug)]
pub struct PodRef<'a> {
    /// Letters, digits, `_`, `.` and `-`.
    pub sandbox_id: &'a str,
    /// Its Kubernetes namespace.
    pub namespace: &'a str,
    /// Its name in there.
    pub name: &'a str,
    /// Its Kubernetes uid.
    pub uid: &'a str,
    /// Ports of the host that lead to it.
    pub port_mappings: &'a [PortMapping],
    /// What it may send and receive.
    pub bandwidth: Bandwidth,
    /// Whether what its machine sends in the name of others is dropped.
    pub filtered: bool,
}

/// Limits in bits per second; `None` for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Of what the pod receives.
    pub ingress: Option<u64>,
    /// Of what it sends.
    pub egress: Option<u64>,
}

/// A port of the host that leads to one of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// 0 is for none: such a mapping is ignored, as CRI wants it.
    pub host_port: u16,
    /// The pod's.
    pub container_port: u16,
    /// Of both.
    pub protocol: Protocol,
    /// Only on this address of the host.
    pub host_ip: Option<IpAddr>,
}

/// Of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// A connected pod, as its machine and its agent need to know it.
#[derive(Debug)]
pub struct Attachment {
    /// Where the namespace is pinned.
    pub netns: PathBuf,
    /// The pod's addresses, the main one first.
    pub ips: Vec<IpAddr>,
    /// The guest's interfaces, the main one first.
    pub interfaces: Vec<GuestInterface>,
    /// The guest's routes in the order in which they can be added.
    pub routes: Vec<Route>,
    /// What the CNI plugins say about name service.
    pub dns: Dns,
}

/// A network interface of the guest.
#[derive(Debug)]
pub struct GuestInterface {
    /// "eth0".
    pub name: String,
    /// The MAC that the network knows it by.
    pub mac: [u8; 6],
    /// In bytes, without the Ethernet header.
    pub mtu: u16,
    /// "10.88.0.5/16".
    pub addresses: Vec<String>,
    /// Non-blocking, with `IFF_VNET_HDR`. The tap goes with its last descriptor.
    /// `None` for the one that was handed out early.
    pub tap: Option<OwnedFd>,
}

/// A route of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// "0.0.0.0/0".
    pub destination: String,
    /// `None` for a route on the link.
    pub gateway: Option<IpAddr>,
    /// Name of the guest's interface.
    pub interface: String,
}

/// Name service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of servers.
    pub servers: Vec<String>,
    /// Domains that are searched.
    pub searches: Vec<String>,
    /// As in `resolv.conf`.
    pub options: Vec<String>,
}

/// Pods cannot be connected now; the text says why and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotReady(String);

/// A pod was not connected, or not disconnected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no CNI configuration, or it is broken.
    #[error(transparent)]
    Config(#[from] conflist::Error),
    /// The request has something that CNI cannot express.
    #[error("pod network: {0}")]
    Pod(String),
    /// The pod is connected already.
    #[error("the network of sandbox {0} exists already")]
    Exists(String),
    /// The record on disk failed.
    #[error("record of the pod's network: {0}")]
    Record(#[source] io::Error),
    /// The namespace failed.
    #[error(transparent)]
    Netns(#[from] netns::Error),
    /// A CNI plugin failed.
    #[error(transparent)]
    Plugin(#[from] plugin::Error),
    /// The plugins' result cannot be used.
    #[error("CNI network {network}: {reason}")]
    Result {
        /// Name of the network.
        network: String,
        /// In words.
        reason: String,
    },
    /// The interfaces could not be joined to taps.
    #[error("pod network: {0}")]
    Guest(#[from] guest::Error),
}

/// Connects and disconnects pods. Calls for different sandboxes may run at the
/// same time; those for one sandbox must not.
#[derive(Clone, Debug)]
pub struct Network {
    conf_dir: PathBuf,
    plugins: Plugins,
    records: Records,
}

impl Network {
    /// Touches nothing yet.
    #[must_use]
    pub fn new(config: NetworkConfig) -> Self {
        Self {
            conf_dir: config.conf_dir,
            plugins: Plugins { directories: config.bin_dirs, timeout: config.plugin_timeout },
            records: Records::new(config.cache_dir),
        }
    }

    /// Whether pods can be connected: there is a configuration, and its
    /// plugins are installed.
    ///
    /// # Errors
    /// The reason, and what to do about it.
    pub fn ready(&self) -> Result<(), NotReady> {
        self.installed().map(drop)
    }

    /// Whether pods can be connected, as the plugins themselves see it, too.
    ///
    /// # Errors
    /// The reason, and what to do about it.
    pub async fn status(&self) -> Result<(), NotReady> {
        let network = self.installed()?;
        cni::status(&self.plugins, &network).await.map_err(|error| NotReady(error.to_string()))
    }

    /// The configuration, if all of its plugins are there.
    fn installed(&self) -> Result<NetworkList, NotReady> {
        let network = conflist::load(&self.conf_dir).map_err(|error| NotReady(error.to_string()))?;
        for plugin in &network.plugins {
            let name = conflist::plugin_type(plugin).map_err(NotReady)?;
            self.plugins.find(name).map_err(|error| NotReady(error.to_string()))?;
        }
        Ok(network)
    }

    /// Whether a pod is still connected as it was when it came.
    ///
    /// # Errors
    /// What the plugins miss.
    pub async fn check(&self, sandbox_id: &str) -> Result<(), Error> {
        match self.records.read(sandbox_id).map_err(Error::Record)? {
            Recorded::Intent(intent, Some(result)) => {
                let here = target(&intent, true);
                Ok(cni::check(&self.plugins, &intent.network, here, &intent.capabilities, &result).await?)
            }
            _ => Ok(()),
        }
    }

    /// Has the plugins give back what they hold for pods that are not recorded.
    /// What goes wrong is logged: the next start tries again.
    pub async fn collect_garbage(&self) {
        let (Ok(network), Ok(ids)) = (conflist::load(&self.conf_dir), self.records.ids()) else { return };
        let valid: Vec<_> = ids.iter().map(|id| (id.as_str(), INTERFACE)).collect();
        for error in cni::gc(&self.plugins, &network, &valid).await {
            tracing::warn!(%error, "give back what pods of the past have left");
        }
    }

    /// Connects a pod. The tap of its main interface is sent `early`, as soon as
    /// there is one: a machine can boot with it while the plugins are at work.
    /// When the future is dropped before its end, what it has done so far stays
    /// until [`Network::detach`].
    ///
    /// # Errors
    /// Everything is undone then, save what a plugin refuses to undo: that
    /// stays recorded for a later [`Network::detach`].
    pub async fn attach(
        &self,
        pod: &PodRef<'_>,
        early: oneshot::Sender<OwnedFd>,
    ) -> Result<Attachment, Error> {
        self.connect(pod, Some(early)).await
    }

    /// Connects a pod whose containers are in the namespace themselves: there is
    /// no tap, and nothing to configure that the plugins have not.
    ///
    /// # Errors
    /// As [`Network::attach`].
    pub async fn attach_host_pod(&self, pod: &PodRef<'_>) -> Result<Attachment, Error> {
        self.connect(pod, None).await
    }

    async fn connect(
        &self,
        pod: &PodRef<'_>,
        early: Option<oneshot::Sender<OwnedFd>>,
    ) -> Result<Attachment, Error> {
        let network = conflist::load(&self.conf_dir)?;
        let intent = Intent {
            sandbox_id: pod.sandbox_id.to_owned(),
            netns: netns::path_of(pod.sandbox_id),
            interface: INTERFACE.to_owned(),
            args: arguments::args(pod)?,
            capabilities: arguments::capabilities(pod),
            network,
        };
        for capability in arguments::missing(&intent.capabilities, &intent.network.plugins) {
            let (sandbox_id, network) = (pod.sandbox_id, &intent.network.name);
            tracing::warn!(
                sandbox_id,
                network,
                capability,
                "no plugin of the pod's network has this capability"
            );
        }
        self.records.begin(&intent).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists(pod.sandbox_id.to_owned()),
            _ => Error::Record(error),
        })?;
        let start = Instant::now();
        if let Err(error) = netns::create(&intent.netns).await {
            self.forget(pod.sandbox_id);
            return Err(error.into());
        }
        let filtered = early.is_some().then_some(pod.filtered);
        if let Some(early) = early {
            let made = netns::run(&intent.netns, guest::main_tap).await.map_err(Error::from);
            match made.and_then(|tap| tap.map_err(Error::from)) {
                // Nobody waits for it any more when the machine has failed.
                Ok(tap) => drop(early.send(tap)),
                Err(error) => {
                    self.clean_up(&intent, Ok(()));
                    return Err(error);
                }
            }
        }
        let namespace = start.elapsed();
        let target = target(&intent, true);
        let result = match cni::add(&self.plugins, &intent.network, target, &intent.capabilities).await {
            Ok(result) => result,
            Err(failed) => {
                let undone =
                    cni::undo(&self.plugins, &intent.network, target, &intent.capabilities, &failed).await;
                self.clean_up(&intent, undone);
                return Err(failed.error.into());
            }
        };
        let plugins = start.elapsed().saturating_sub(namespace);
        match self.finish(&intent, &result, filtered).await {
            Ok(attachment) => {
                let total = start.elapsed();
                tracing::debug!(
                    sandbox_id = pod.sandbox_id,
                    ?namespace,
                    ?plugins,
                    ?total,
                    "pod network connected"
                );
                Ok(attachment)
            }
            Err(error) => {
                let undone =
                    cni::del(&self.plugins, &intent.network, target, &intent.capabilities, Some(&result))
                        .await;
                self.clean_up(&intent, undone);
                Err(error)
            }
        }
    }

    /// What follows a successful ADD. `filtered` is `None` for a pod without taps.
    async fn finish(
        &self,
        intent: &Intent,
        result: &Value,
        filtered: Option<bool>,
    ) -> Result<Attachment, Error> {
        self.records.complete(&intent.sandbox_id, result).map_err(Error::Record)?;
        let wrong = |reason| Error::Result { network: intent.network.name.clone(), reason };
        let pod = result::parse(result).map_err(wrong)?;
        if pod.addresses.is_empty() {
            return Err(wrong("the plugins gave the pod no address: configure an ipam plugin".into()));
        }
        let ips = pod.addresses.iter().map(|address| address.addr()).collect();
        let Some(filtered) = filtered else {
            let (interfaces, routes) = (Vec::new(), Vec::new());
            return Ok(Attachment { netns: intent.netns.clone(), ips, interfaces, routes, dns: pod.dns });
        };
        let main = guest::Main { name: intent.interface.clone(), addresses: pod.addresses.clone() };
        let join = move || netns::with_netlink(async |netlink| guest::join(&netlink, &main, filtered).await);
        let joined = netns::run(&intent.netns, join).await?;
        let mut guest = joined
            .map_err(|source| guest::Error::Kernel { step: "reach rtnetlink".into(), source })
            .and_then(|joined| joined)?;
        // A plugin may leave it to the machine to configure its interface.
        if let Some(interface) = guest.interfaces.first_mut()
            && interface.addresses.is_empty()
        {
            interface.addresses = pod.addresses.iter().map(ToString::to_string).collect();
            guest.routes = pod
                .routes
                .iter()
                .map(|(to, gateway)| Route {
                    destination: to.to_string(),
                    gateway: *gateway,
                    interface: interface.name.clone(),
                })
                .collect();
        }
        Ok(Attachment {
            netns: intent.netns.clone(),
            ips,
            interfaces: guest.interfaces,
            routes: guest.routes,
            dns: pod.dns,
        })
    }

    /// Disconnects a pod, by what is recorded about it. A sandbox without a
    /// record is fine.
    ///
    /// # Errors
    /// The record stays, and the call can be repeated.
    pub async fn detach(&self, sandbox_id: &str) -> Result<(), Error> {
        match self.records.read(sandbox_id).map_err(Error::Record)? {
            Recorded::Nothing => return Ok(()),
            Recorded::Unreadable(reason) => {
                // The intent is synced before anything is made, so mostly
                // nothing was. There is no plugin to call in any case.
                tracing::warn!(sandbox_id, reason, "the record of a pod's network is unreadable");
                netns::remove(&netns::path_of(sandbox_id))?;
            }
            Recorded::Intent(intent, result) => {
                let (plugins, network) = (&self.plugins, &intent.network);
                let here = target(&intent, netns::exists(&intent.netns));
                let deleted = cni::del(plugins, network, here, &intent.capabilities, result.as_ref()).await;
                if let Err(error) = deleted {
                    if result.is_some() {
                        return Err(error.into());
                    }
                    // ADD was interrupted, and some plugins fail over what they
                    // had not made yet. Without the namespace they give back
                    // what they hold outside of it.
                    tracing::warn!(sandbox_id, %error, "undoing an interrupted ADD without its namespace");
                    netns::remove(&intent.netns)?;
                    cni::del(plugins, network, target(&intent, false), &intent.capabilities, None).await?;
                }
                netns::remove(&intent.netns)?;
            }
        }
        self.records.remove(sandbox_id).map_err(Error::Record)
    }

    /// Sandboxes that may have something to disconnect.
    ///
    /// # Errors
    /// The file system's.
    pub fn recorded(&self) -> io::Result<Vec<String>> {
        self.records.ids()
    }

    /// After a failure. The caller gets the failure itself; what goes wrong
    /// while cleaning up behind it is logged.
    fn clean_up(&self, intent: &Intent, undone: Result<(), plugin::Error>) {
        let sandbox_id = intent.sandbox_id.as_str();
        if let Err(error) = netns::remove(&intent.netns) {
            tracing::warn!(sandbox_id, %error, "a network namespace stays");
            return;
        }
        match undone {
            Ok(()) => self.forget(sandbox_id),
            Err(error) => tracing::warn!(sandbox_id, %error, "the pod's network stays recorded"),
        }
    }

    fn forget(&self, sandbox_id: &str) {
        if let Err(error) = self.records.remove(sandbox_id) {
            tracing::warn!(sandbox_id, %error, "the record of a pod's network stays");
        }
    }
}

fn target(intent: &Intent, netns: bool) -> Target<'_> {
    Target {
        sandbox_id: &intent.sandbox_id,
        netns: netns.then_some(intent.netns.as_path()),
        interface: &intent.interface,
        args: &intent.args,
    }
}
