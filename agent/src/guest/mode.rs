//! The two places of an agent: it is the first process of a pod's virtual
//! machine, or the supervisor of a pod of plain host containers.
//!
//! Both serve the same requests. In a machine everything is the pod's: its
//! clock, its network interfaces, `/run/husk`. On the host only what the agent
//! was given is: the namespaces it has entered, and a directory.

use std::path::{Path, PathBuf};

use husk_proto::agent::paths;

/// The place of the agent.
#[derive(Debug, Default)]
pub enum Mode {
    /// In a machine of its own, as its first process.
    #[default]
    Guest,
    /// On the host.
    Host(Host),
}

/// The parts of the host that its supervisor was given.
#[derive(Debug, Default)]
pub struct Host {
    /// The pod's directory: a mount of its own, so that what is mounted below
    /// stays in the agent's mount namespace.
    pub directory: PathBuf,
    /// Where the writable layers of its containers go.
    pub layers: PathBuf,
    /// The OCI runtime.
    pub runc: PathBuf,
    /// The pod's control group, below `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
    /// The pod's network namespace; none for the host's.
    pub netns: Option<PathBuf>,
    /// IPC is the pod's own and not the host's.
    pub own_ipc: bool,
}

impl Mode {
    /// The supervisor's part of the host; `None` in a machine.
    pub const fn host(&self) -> Option<&Host> {
        match self {
            Self::Guest => None,
            Self::Host(host) => Some(host),
        }
    }

    /// Where a place below a machine's `/run/husk` is here.
    pub fn at(&self, path: &str) -> PathBuf {
        match self {
            Self::Guest => path.into(),
            Self::Host(host) => moved(path, &host.directory),
        }
    }
}

fn moved(path: &str, directory: &Path) -> PathBuf {
    let below = path.strip_prefix(paths::BASE).unwrap_or(path).trim_start_matches('/');
    directory.join(below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_of_the_machine_is_in_the_pods_directory_on_the_host() {
        let directory = Path::new("/run/husk/sandboxes/abc");
        assert_eq!(moved(paths::HOSTS, directory), directory.join("sandbox/hosts"));
        assert_eq!(moved(paths::SHM, directory), directory.join("sandbox/shm"));
        assert_eq!(moved("/run/husk/bundles", directory), directory.join("bundles"));
    }
}
