//! The two places of an agent: the first process of a pod's virtual machine,
//! and the supervisor of a pod of plain host containers.
//!
//! Both serve the same requests. In a machine everything belongs to the pod:
//! its clock, its network interfaces, `/run/husk`. On the host only the
//! resources that the agent was given do: the namespaces that it has entered,
//! and a directory.

use std::path::{Path, PathBuf};

use husk_proto::agent::paths;

/// The place of the agent.
#[derive(Debug, Default)]
pub enum Mode {
    /// The agent is the first process of a machine of its own.
    #[default]
    Guest,
    /// The agent is a supervisor on the host.
    Host(Host),
}

/// The resources of the host that a supervisor was given.
#[derive(Debug, Default)]
pub struct Host {
    /// The pod's directory. It is a mount of its own, so that mounts below it
    /// stay in the agent's mount namespace.
    pub directory: PathBuf,
    /// The directory of the containers' writable layers.
    pub layers: PathBuf,
    /// The OCI runtime's program.
    pub runc: PathBuf,
    /// The pod's control group, below `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
    /// The pod's network namespace; `None` for the host's.
    pub netns: Option<PathBuf>,
    /// Whether the pod has an IPC namespace of its own, and not the host's.
    pub own_ipc: bool,
}

impl Mode {
    /// The supervisor's resources; `None` in a machine.
    pub const fn host(&self) -> Option<&Host> {
        match self {
            Self::Guest => None,
            Self::Host(host) => Some(host),
        }
    }

    /// The path here that corresponds to a path below a machine's `/run/husk`.
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
