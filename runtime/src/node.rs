//! Everything that one huskd has.

use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
use crate::dirs::{self, ROOT_ONLY, TRAVERSE_ONLY};
use crate::events::Events;
use crate::image::{ImageConfig, ImageStore};
use crate::network::{Network, NetworkConfig};
use crate::sandbox::registry::Registry;
use crate::storage::Scratch;
use crate::streaming::Streaming;
use crate::vm::template::Templates;

/// One node's parts. Each looks after itself; the verbs in `cri` bring them
/// together.
#[derive(Debug)]
pub struct Node {
    /// As configured.
    pub config: Config,
    /// Images.
    pub images: Arc<ImageStore>,
    /// Pod networks.
    pub network: Network,
    /// Sandboxes and containers.
    pub registry: Registry,
    /// Sandbox disks.
    pub scratch: Arc<Scratch>,
    /// Machines from which those of pods are cloned.
    pub templates: Arc<Templates>,
    /// Where what happens to pods and containers is told.
    pub events: Events,
    /// Exec, attach and port-forward.
    pub streaming: Arc<Streaming>,
}

impl Node {
    /// Opens what is on disk. Makes no machine and no network.
    ///
    /// # Errors
    /// With the folder or file that cannot be used.
    pub fn open(config: Config) -> anyhow::Result<Self> {
        use anyhow::Context;
        let network_dir = config.state_dir.join("network");
        let scratch_dir = config.state_dir.join("scratch");
        // What pods are told in secret is in records, on disks and in machines'
        // memory. Through the run directory, the users of host pods with user
        // namespaces reach their own files.
        for (folder, mode) in [
            (&config.state_dir, TRAVERSE_ONLY),
            (&config.state_dir.join("sandboxes"), ROOT_ONLY),
            (&config.state_dir.join("templates"), ROOT_ONLY),
            (&network_dir, ROOT_ONLY),
            (&scratch_dir, ROOT_ONLY),
            (&config.run_dir, TRAVERSE_ONLY),
            (&config.run_dir.join("sandboxes"), TRAVERSE_ONLY),
        ] {
            dirs::make(folder, mode).with_context(|| format!("make folder {}", folder.display()))?;
        }
        let images = ImageStore::open(
            &config.state_dir,
            ImageConfig {
                insecure_registries: config.images.insecure_registries.clone(),
                hosts_dir: config.images.hosts_dir.clone(),
                stall_timeout: Duration::from_secs(config.images.stall_timeout_seconds),
                pull_timeout: Duration::from_secs(config.images.pull_timeout_seconds),
                ..ImageConfig::default()
            },
        )
        .with_context(|| format!("open images in {}", config.state_dir.display()))?;
        let network = Network::new(NetworkConfig {
            conf_dir: config.network.conf_dir.clone(),
            bin_dirs: config.network.bin_dirs.clone(),
            cache_dir: network_dir,
            plugin_timeout: Duration::from_secs(config.network.plugin_timeout_seconds),
        });
        let scratch = Arc::new(Scratch::new(scratch_dir));
        let templates = Arc::new(Templates::new(&config.state_dir, &config.run_dir, scratch.clone()));
        let address = config.streaming.address;
        let streaming = Streaming::listen(address).with_context(|| {
            format!("listen on {address} for exec, attach and port-forward (`address` of [streaming])")
        })?;
        let streaming = Arc::new(streaming);
        Ok(Self {
            images: Arc::new(images),
            network,
            registry: Registry::default(),
            scratch,
            templates,
            streaming,
            events: Events::default(),
            config,
        })
    }

    /// Where the sandboxes' records are.
    #[must_use]
    pub fn sandboxes_dir(&self) -> std::path::PathBuf {
        self.config.state_dir.join("sandboxes")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt;

    use crate::sandbox::tests::{node, running};

    #[tokio::test]
    async fn other_users_of_the_node_read_nothing_of_pods() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let mode = |path: &str| std::fs::metadata(root.join(path)).unwrap().permissions().mode() & 0o7777;
        // As an earlier huskd, or an administrator, may have left them.
        for path in ["state/images/pulls", "state/sandboxes", "run/sandboxes"] {
            std::fs::create_dir_all(root.join(path)).unwrap();
            std::fs::set_permissions(root.join(path), PermissionsExt::from_mode(0o755)).unwrap();
        }
        let node = node(root);
        running(&node.sandboxes_dir(), "pod", node.events.clone());
        for path in ["state", "run", "run/sandboxes"] {
            assert_eq!(mode(path), 0o711, "{path}");
        }
        for path in ["images", "network", "sandboxes", "scratch", "templates"] {
            assert_eq!(mode(&format!("state/{path}")), 0o700, "{path}");
        }
        for path in ["sandbox.json", "containers/c-of-pod.json"] {
            assert_eq!(mode(&format!("state/sandboxes/pod/{path}")), 0o600, "{path}");
        }
    }
}
