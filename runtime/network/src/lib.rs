//! The pod's network: a netns, CNI, and taps that join it to the machine.
//!
//! ```text
//!   host            pod's netns                        VM
//!   cni0 ── veth ── eth0 ──── tc redirect ──▶─ tap0_husk ── virtio-net (eth0)
//!                        ─◀── tc filter  ────
//! ```
//!
//! [`Network::attach`] records what it is about to do ([`record`]), makes
//! the namespace ([`netns`]), has the CNI plugins connect it ([`cni`],
//! [`plugin`]), and joins what they made to taps ([`guest`], [`tap`]).
//! [`Network::detach`] works from the record alone: after a crash,
//! a reboot, or a change of `/etc/cni/net.d` it disconnects the pod with the
//! configuration that had connected it.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_base::{FileError, blocking, chain, crash};
use serde_json::Value;
use tokio::sync::{Mutex, oneshot};

mod arguments;
mod attachment;
mod cni;
#[expect(clippy::disallowed_methods, reason = "its functions block, and say so")]
mod conflist;
mod filter;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod guest;
mod leftovers;
mod netns;
mod plugin;
mod pod;
#[expect(clippy::disallowed_methods, reason = "its functions block, and say so")]
mod record;
pub mod resolv_conf;
mod result;
mod tap;
mod tc;

/// A tap in a network namespace of its own that nothing else is in, for a
/// machine that is no pod. Both end with the tap's last descriptor.
///
/// # Errors
/// The kernel's.
pub async fn unconnected_tap() -> Result<OwnedFd, Error> {
    Ok(netns::run_in_new(guest::main_tap).await??)
}

/// Tries out, in a network namespace of its own, what a pod's network needs of
/// the kernel.
///
/// # Errors
/// The step that the kernel refuses.
pub async fn probe() -> Result<(), Error> {
    let probe = || netns::with_netlink(async |netlink| guest::probe(&netlink).await);
    Ok(netns::run_in_new(probe).await?.map_err(guest::Error::rtnetlink)??)
}

#[cfg(test)]
mod tests;

pub use arguments::rate;
pub use attachment::{Attachment, Dns, GuestInterface, Route};
pub use pod::{Bandwidth, PodRef, PortMapping, Protocol};

use conflist::NetworkList;
use plugin::{Plugins, Target};
use record::{Intent, Recorded, Records};

/// The interface that CNI plugins are asked for.
const INTERFACE: &str = "eth0";

/// Paths of CNI, and the deadline of its plugins.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// CNI network configurations, `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// CNI plugins, `/opt/cni/bin` and `/usr/lib/cni`.
    pub bin_dirs: Vec<PathBuf>,
    /// Records of connected pods. On a disk that survives a reboot, since so
    /// do the leases of IPAM plugins.
    pub cache_dir: PathBuf,
    /// The deadline of one call of one plugin.
    pub plugin_timeout: Duration,
}

/// Pods cannot be connected now; the text says why and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotReady(String);

impl NotReady {
    fn because(error: impl std::error::Error) -> Self {
        Self(chain(&error))
    }
}

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
    #[error(transparent)]
    Record(#[from] FileError),
    /// The namespace failed.
    #[error(transparent)]
    Netns(#[from] netns::Error),
    /// A CNI plugin failed.
    #[error(transparent)]
    Plugin(#[from] plugin::Error),
    /// An interrupted call of a plugin does not end.
    #[error(transparent)]
    Leftovers(#[from] leftovers::Unending),
    /// The plugins' result cannot be used.
    #[error("CNI network {network}: {reason}")]
    Result {
        /// Name of the network.
        network: String,
        /// The reason.
        reason: String,
    },
    /// The interfaces could not be joined to taps.
    #[error(transparent)]
    Guest(#[from] guest::Error),
}

/// Connects and disconnects pods. Calls for different sandboxes may run at the
/// same time; those for one sandbox must not.
#[derive(Clone, Debug)]
pub struct Network {
    conf_dir: PathBuf,
    plugins: Plugins,
    /// Used by one call at a time.
    records: Arc<Mutex<Records>>,
}

impl Network {
    /// Makes the value. Nothing is read or made on disk yet.
    #[must_use]
    pub fn new(config: NetworkConfig) -> Self {
        Self {
            conf_dir: config.conf_dir,
            plugins: Plugins { directories: config.bin_dirs, timeout: config.plugin_timeout },
            records: Arc::new(Mutex::new(Records::new(config.cache_dir))),
        }
    }

    /// Whether pods can be connected: there is a configuration, and its
    /// plugins are installed.
    ///
    /// # Errors
    /// The reason, and what to do about it.
    pub async fn ready(&self) -> Result<(), NotReady> {
        self.installed().await.map(drop)
    }

    /// Whether pods can be connected, as the plugins themselves see it, too.
    ///
    /// # Errors
    /// The reason, and what to do about it.
    pub async fn status(&self) -> Result<(), NotReady> {
        let network = self.installed().await?;
        cni::status(&self.plugins, &network).await.map_err(NotReady::because)
    }

    /// The configuration, if all of its plugins are there.
    async fn installed(&self) -> Result<NetworkList, NotReady> {
        let network = self.configuration().await.map_err(NotReady::because)?;
        for plugin in &network.plugins {
            let name = conflist::plugin_type(plugin).map_err(NotReady)?;
            self.plugins.find(name).await.map_err(NotReady::because)?;
        }
        Ok(network)
    }

    /// Whether a pod is still connected as it was when it came.
    ///
    /// # Errors
    /// The plugin that misses something, and its reason.
    pub async fn check(&self, sandbox_id: &str) -> Result<(), Error> {
        match self.read(sandbox_id).await? {
            Recorded::Intent(intent, Some(result)) => {
                let here = target(&intent, true);
                Ok(cni::check(&self.plugins, &intent.network, here, &intent.capabilities, &result).await?)
            }
            _ => Ok(()),
        }
    }

    /// Has the plugins give back what they hold for pods that are not recorded.
    /// Failures are logged: the next start tries again.
    pub async fn collect_garbage(&self) {
        let (Ok(network), Ok(ids)) = (self.configuration().await, self.recorded().await) else { return };
        let valid: Vec<_> = ids.iter().map(|id| (id.as_str(), INTERFACE)).collect();
        for error in cni::gc(&self.plugins, &network, &valid).await {
            tracing::warn!(error = chain(&error), "give back what pods of the past have left");
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
    /// The same as those of [`Network::attach`].
    pub async fn attach_host_pod(&self, pod: &PodRef<'_>) -> Result<Attachment, Error> {
        self.connect(pod, None).await
    }

    async fn connect(
        &self,
        pod: &PodRef<'_>,
        early: Option<oneshot::Sender<OwnedFd>>,
    ) -> Result<Attachment, Error> {
        let network = self.configuration().await?;
        let intent = Intent {
            sandbox_id: pod.sandbox_id.to_owned(),
            netns: netns::path_of(pod.sandbox_id),
            interface: INTERFACE.to_owned(),
            args: arguments::args(pod).map_err(Error::Pod)?,
            capabilities: arguments::capabilities(pod),
            network,
        };
        for capability in arguments::missing(&intent.capabilities, &intent.network.plugins) {
            let network = &intent.network.name;
            tracing::warn!(network, capability, "no plugin of the pod's network has this capability");
        }
        let begun = intent.clone();
        self.with_records(move |records| records.begin(&begun)).await.map_err(|error| {
            match error.source.kind() {
                io::ErrorKind::AlreadyExists => Error::Exists(pod.sandbox_id.to_owned()),
                _ => Error::Record(error),
            }
        })?;
        crash::point("network recorded");
        let start = Instant::now();
        if let Err(error) = netns::create(&intent.netns).await {
            self.forget(pod.sandbox_id).await;
            return Err(error.into());
        }
        let filtered = early.is_some().then_some(pod.filtered);
        if let Some(early) = early {
            let made = netns::run(&intent.netns, guest::main_tap).await.map_err(Error::from);
            match made.and_then(|tap| tap.map_err(Error::from)) {
                // Nobody waits for it any more when the machine has failed.
                Ok(tap) => drop(early.send(tap)),
                Err(error) => {
                    self.clean_up(&intent, Ok(())).await;
                    return Err(error);
                }
            }
        }
        crash::point("tap made");
        let namespace = start.elapsed();
        let target = target(&intent, true);
        let result = match cni::add(&self.plugins, &intent.network, target, &intent.capabilities).await {
            Ok(result) => result,
            Err(failed) => {
                let undone =
                    cni::undo(&self.plugins, &intent.network, target, &intent.capabilities, &failed).await;
                self.clean_up(&intent, undone).await;
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
                self.clean_up(&intent, undone).await;
                Err(error)
            }
        }
    }

    /// Completes a pod after a successful ADD. `filtered` is `None` for a pod without taps.
    async fn finish(
        &self,
        intent: &Intent,
        result: &Value,
        filtered: Option<bool>,
    ) -> Result<Attachment, Error> {
        let (id, answer) = (intent.sandbox_id.clone(), result.clone());
        self.with_records(move |records| records.complete(&id, &answer)).await?;
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
        crash::point("taps joined");
        let mut guest = joined.map_err(guest::Error::rtnetlink).and_then(|joined| joined)?;
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
        match self.read(sandbox_id).await? {
            Recorded::Nothing => return Ok(()),
            Recorded::Unreadable(reason) => {
                // The intent is synced before anything is made, so mostly
                // nothing was. There is no plugin to call in any case.
                tracing::warn!(reason, "the record of a pod's network is unreadable");
                netns::remove(&netns::path_of(sandbox_id)).await?;
            }
            Recorded::Intent(intent, result) => {
                if result.is_none() {
                    leftovers::end(sandbox_id).await?;
                }
                let (plugins, network) = (&self.plugins, &intent.network);
                let here = target(&intent, netns::exists(&intent.netns).await);
                let deleted = cni::del(plugins, network, here, &intent.capabilities, result.as_ref()).await;
                if let Err(error) = deleted {
                    if result.is_some() {
                        return Err(error.into());
                    }
                    // ADD was interrupted, and some plugins fail over what they
                    // had not made yet. Without the namespace they give back
                    // what they hold outside of it.
                    tracing::warn!(error = chain(&error), "undoing an interrupted ADD without its namespace");
                    netns::remove(&intent.netns).await?;
                    cni::del(plugins, network, target(&intent, false), &intent.capabilities, None).await?;
                }
                netns::remove(&intent.netns).await?;
            }
        }
        Ok(self.remove(sandbox_id).await?)
    }

    /// Sandboxes that may have something to disconnect.
    ///
    /// # Errors
    /// The file system's.
    pub async fn recorded(&self) -> Result<Vec<String>, Error> {
        Ok(self.with_records(Records::ids).await?)
    }

    async fn read(&self, sandbox_id: &str) -> Result<Recorded, FileError> {
        let id = sandbox_id.to_owned();
        self.with_records(move |records| records.read(&id)).await
    }

    async fn remove(&self, sandbox_id: &str) -> Result<(), FileError> {
        let id = sandbox_id.to_owned();
        self.with_records(move |records| records.remove(&id)).await
    }

    /// Reads or writes records, on a thread where that may block. One call goes after the
    /// other, so that a [`Network::detach`] finds what a dropped [`Network::attach`] was
    /// about to write.
    async fn with_records<T: Send + 'static>(&self, calls: impl FnOnce(&Records) -> T + Send + 'static) -> T {
        let records = self.records.clone().lock_owned().await;
        blocking(move || calls(&records)).await
    }

    /// The configuration of the node's network, as it is now.
    async fn configuration(&self) -> Result<NetworkList, conflist::Error> {
        let dir = self.conf_dir.clone();
        blocking(move || conflist::load(&dir)).await
    }

    /// After a failure. The caller gets the failure itself; what goes wrong
    /// while cleaning up behind it is logged.
    async fn clean_up(&self, intent: &Intent, undone: Result<(), plugin::Error>) {
        let sandbox_id = intent.sandbox_id.as_str();
        if let Err(error) = netns::remove(&intent.netns).await {
            tracing::warn!(error = chain(&error), "failed to remove a network namespace");
            return;
        }
        match undone {
            Ok(()) => self.forget(sandbox_id).await,
            Err(error) => {
                tracing::warn!(error = chain(&error), "the pod's network stays recorded")
            }
        }
    }

    async fn forget(&self, sandbox_id: &str) {
        if let Err(error) = self.remove(sandbox_id).await {
            tracing::warn!(error = chain(&error), "the record of a pod's network stays");
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
