//! The pod's volumes: one file system of the host, mounted when the first
//! container needs it.

use std::path::Path;

use husk_proto::agent::paths::{SHARED, SHARED_TAG};
use nix::mount::MsFlags;
use oci_spec::runtime::Spec;
use tokio::sync::Mutex;

use crate::guest::mounts::{self, Error};

/// Whether a container has a volume on that file system.
pub fn is_used_by(spec: &Spec) -> bool {
    let mut sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref());
    sources.any(|source| source.starts_with(SHARED))
}

/// The mount of the host's file system.
#[derive(Default)]
pub struct SharedDir {
    mounted: Mutex<bool>,
}

impl SharedDir {
    /// Mounts the file system, unless it is mounted.
    pub async fn mount(&self) -> Result<(), Error> {
        let mut mounted = self.mounted.lock().await;
        if !*mounted {
            // The mount waits for the host, and must not hold up the agent.
            in_background(|| {
                mounts::make_mount_point(Path::new(SHARED))?;
                mounts::mount(SHARED_TAG, SHARED, "virtiofs", MsFlags::empty(), "")
            })
            .await?;
            *mounted = true;
        }
        Ok(())
    }

    /// Makes the kernel forget the files that no container uses any more. It
    /// caches names that were used, and the host cannot unmount the volumes
    /// that they are on.
    pub async fn forget_unused(&self) {
        let mounted = self.mounted.lock().await;
        if *mounted {
            // The kernel drops unused names of a file system that is remounted.
            let dropped =
                in_background(|| mounts::mount("none", SHARED, "none", MsFlags::MS_REMOUNT, "")).await;
            if let Err(error) = dropped {
                tracing::warn!(%error, "failed to forget unused files of volumes");
            }
        }
    }
}

async fn in_background(work: impl FnOnce() -> Result<(), Error> + Send + 'static) -> Result<(), Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_with_volumes_are_told_from_others() {
        let with = |source: &str| {
            let json = format!(
                r#"{{"ociVersion":"1.0.2","mounts":[{{"destination":"/proc","type":"proc","source":"proc"}},
                    {{"destination":"/data","type":"bind","source":"{source}"}}]}}"#
            );
            is_used_by(&serde_json::from_str(&json).unwrap())
        };
        assert!(with("/run/husk/shared/v0"));
        assert!(!with("/run/husk/sandbox/hosts"));
        assert!(!with("/run/husk/shared-not"));
    }
}
