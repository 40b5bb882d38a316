//! Orphans: machines, volumes and networks that no record names. They end when
//! huskd starts.

use husk_backend::Place;
use husk_base::dirs;
use husk_base::id::SandboxId;
use husk_volumes::SharedDir;

use crate::Node;

/// Ends machines, and gives back volumes and networks, that belong to none of
/// the known sandboxes.
pub(super) async fn end(node: &Node, known: &[SandboxId]) {
    let run_dirs: Vec<_> = known.iter().map(|id| dirs::sandbox_run_dir(&node.config.run_dir, id)).collect();
    for path in std::fs::read_dir(node.config.run_dir.join("sandboxes")).into_iter().flatten().flatten() {
        let path = path.path();
        if !run_dirs.contains(&path) {
            tracing::info!(path = %path.display(), "end a machine that no record speaks of");
            if let Err(error) = Place::destroy_orphan(&path).await {
                tracing::warn!(path = %path.display(), %error, "end an orphaned machine");
            }
        }
    }
    let shared: Vec<_> = known.iter().map(|id| SharedDir::of(&node.config.run_dir, id)).collect();
    for orphan in SharedDir::all(&node.config.run_dir) {
        if !shared.iter().any(|shared| shared.path() == orphan.path()) {
            tracing::info!(path = %orphan.path().display(), "unmount volumes that no record speaks of");
            if let Err(error) = orphan.close() {
                tracing::warn!(path = %orphan.path().display(), %error, "unmount orphaned volumes");
            }
        }
    }
    for id in node.network.recorded().unwrap_or_default() {
        if !known.iter().any(|other| other.as_str() == id) {
            tracing::info!(sandbox = id, "give back a network that no record speaks of");
            if let Err(error) = node.network.detach(&id).await {
                tracing::warn!(
                    sandbox = id,
                    error = husk_base::chain(&error),
                    "give back an orphaned network"
                );
            }
        }
    }
}
