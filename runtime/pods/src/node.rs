//! Everything that one huskd has.

use std::sync::Arc;
use std::time::Duration;

use husk_backend::Services;
use husk_base::dirs::{self, ROOT_ONLY, TRAVERSE_ONLY};
use husk_config::Config;
use husk_image::{ImageConfig, ImageStore};
use husk_network::{Network, NetworkConfig};
use husk_streaming::Streaming;
use husk_vm::SandboxDisks;
use husk_vm::template::{MakeTap, Templates};

use crate::model::{Events, Registry};

/// One node's parts. Each looks after itself; operations bring them together.
#[derive(Debug)]
pub struct Node {
    /// The configuration that huskd started with.
    pub config: Config,
    /// The images of the node.
    pub images: Arc<ImageStore>,
    /// The networks of pods.
    pub network: Network,
    /// The pods and containers of the node.
    pub registry: Registry,
    /// The writable disks of VMs.
    pub disks: Arc<SandboxDisks>,
    /// VMs from which those of pods are cloned.
    pub templates: Arc<Templates>,
    /// Events of pods and containers, for whoever listens.
    pub events: Events,
    /// Exec, attach and port-forward.
    pub streaming: Arc<Streaming>,
}

impl Node {
    /// Opens what is on disk. Makes no VM and no network. This blocks.
    ///
    /// # Errors
    /// The error names the folder or file that cannot be used.
    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    pub fn open(config: Config) -> anyhow::Result<Self> {
        use anyhow::Context;
        let network_dir = config.state_dir.join("network");
        let scratch_dir = config.state_dir.join("scratch");
        // Secrets of pods are in records, on disks and in machines'
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
                trusted_hosts: config.images.trusted_hosts.clone(),
                hosts_dir: config.images.hosts_dir.clone(),
                stall_timeout: Duration::from_secs(config.images.stall_timeout_seconds),
                pull_timeout: Duration::from_secs(config.images.pull_timeout_seconds),
                min_free: config.images.min_free_mib.saturating_mul(1 << 20),
                parallel_pulls: config.images.parallel_pulls,
                parallel_unpacks: config.images.parallel_unpacks,
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
        let disks = Arc::new(SandboxDisks::new(scratch_dir));
        let make_tap =
            MakeTap::new(|| async { husk_network::unconnected_tap().await.map_err(std::io::Error::other) });
        let templates = Arc::new(Templates::new(&config.state_dir, &config.run_dir, disks.clone(), make_tap));
        let address = config.streaming.address;
        let streaming = Streaming::listen(address).with_context(|| {
            format!("listen on {address} for exec, attach and port-forward (`address` of [streaming])")
        })?;
        let streaming = Arc::new(streaming);
        Ok(Self {
            images: Arc::new(images),
            network,
            registry: Registry::default(),
            disks,
            templates,
            streaming,
            events: Events::default(),
            config,
        })
    }

    /// The parts that a start of a pod needs.
    #[must_use]
    pub fn services(&self) -> Services<'_> {
        Services { network: &self.network, templates: &self.templates, disks: &self.disks }
    }

    /// Where the sandboxes' records are.
    #[must_use]
    pub fn sandboxes_dir(&self) -> std::path::PathBuf {
        self.config.state_dir.join("sandboxes")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use crate::test_util::{node, running};

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
        running(&node.sandboxes_dir(), "pod", node.events.clone()).await;
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
