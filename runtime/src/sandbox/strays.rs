//! What no record speaks of: it has no owner any more, and ends when huskd
//! starts.

use crate::cri::error::Error;
use crate::host;
use crate::id::SandboxId;
use crate::node::Node;
use crate::storage::volumes::Shared;
use crate::vm;

/// Ends machines, and gives back volumes and networks, that belong to none of
/// the known sandboxes.
pub(super) async fn end(node: &Node, known: &[SandboxId]) {
    let run_dirs: Vec<_> = known.iter().map(|id| vm::run_dir(&node.config.run_dir, id)).collect();
    for path in std::fs::read_dir(node.config.run_dir.join("sandboxes")).into_iter().flatten().flatten() {
        let path = path.path();
        if !run_dirs.contains(&path) {
            tracing::info!(path = %path.display(), "end a machine that no record speaks of");
            let ended = match host::owns(&path) {
                true => host::destroy(&path, None).await.map_err(Error::from),
                false => vm::destroy(&path).await.map_err(Error::from),
            };
            if let Err(error) = ended {
                tracing::warn!(path = %path.display(), %error, "end stray machine");
            }
        }
    }
    let shared: Vec<_> = known.iter().map(|id| Shared::of(&node.config.run_dir, id)).collect();
    for stray in Shared::all(&node.config.run_dir) {
        if !shared.iter().any(|shared| shared.path() == stray.path()) {
            tracing::info!(path = %stray.path().display(), "unmount volumes that no record speaks of");
            if let Err(error) = stray.close() {
                tracing::warn!(path = %stray.path().display(), %error, "unmount stray volumes");
            }
        }
    }
    for id in node.network.recorded().unwrap_or_default() {
        if !known.iter().any(|other| other.as_str() == id) {
            tracing::info!(sandbox = id, "give back a network that no record speaks of");
            if let Err(error) = node.network.detach(&id).await {
                tracing::warn!(sandbox = id, %error, "give back stray network");
            }
        }
    }
}
