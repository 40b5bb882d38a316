//! Orphans: machines, volumes and networks that no record names. They end when
//! huskd starts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_backend::Place;
use husk_base::id::SandboxId;
use husk_base::{blocking, chain, dirs};
use husk_volumes::SharedDir;
use tracing::Instrument;

use crate::{Node, span};

/// Ends machines, and gives back volumes and networks, that belong to none of
/// the known sandboxes.
pub(super) async fn end(node: &Arc<Node>, known: &[SandboxId]) {
    end_machines(node, known).await;
    let (closing, ids) = (node.clone(), known.to_vec());
    blocking(move || close_volumes(&closing, &ids)).await;
    detach_networks(node, known).await;
}

async fn end_machines(node: &Node, known: &[SandboxId]) {
    let run_dirs: Vec<_> = known.iter().map(|id| dirs::sandbox_run_dir(&node.config.run_dir, id)).collect();
    let folder = node.config.run_dir.join("sandboxes");
    for path in blocking(move || below(&folder)).await {
        if !run_dirs.contains(&path) {
            tracing::info!(path = %path.display(), "ending a pod that no record names");
            if let Err(error) = Place::destroy_orphan(&path).await {
                tracing::warn!(path = %path.display(), error = chain(&error), "failed to end an orphaned pod");
            }
        }
    }
}

/// The entries of a folder; none of one that cannot be read. This blocks.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn below(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Unmounts volumes that no record names. This blocks.
fn close_volumes(node: &Node, known: &[SandboxId]) {
    let shared: Vec<_> = known.iter().map(|id| SharedDir::of(&node.config.run_dir, id)).collect();
    for orphan in SharedDir::all(&node.config.run_dir) {
        if !shared.iter().any(|shared| shared.path() == orphan.path()) {
            tracing::info!(path = %orphan.path().display(), "unmounting volumes that no record names");
            if let Err(error) = orphan.close() {
                tracing::warn!(path = %orphan.path().display(), error = chain(&error), "failed to unmount orphaned volumes");
            }
        }
    }
}

async fn detach_networks(node: &Node, known: &[SandboxId]) {
    for id in node.network.recorded().await.unwrap_or_default() {
        if !known.iter().any(|other| other.as_str() == id) {
            let span = span::sandbox(&SandboxId::from(id.as_str()));
            detach_network(node, &id).instrument(span).await;
        }
    }
}

async fn detach_network(node: &Node, id: &str) {
    tracing::info!("releasing a network that no record names");
    if let Err(error) = node.network.detach(id).await {
        tracing::warn!(error = chain(&error), "failed to release an orphaned network");
    }
}
