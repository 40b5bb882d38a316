//! The interface of huskd and husk-agent: the gRPC service, vsock ports, the
//! places in the guest that a container's OCI configuration may name, and the
//! header that opens a standard stream.

#[allow(missing_docs, clippy::all)]
mod generated {
    tonic::include_proto!("husk.agent.v1");
}
pub use generated::*;

pub mod stream;

/// The version of the service and of the streams. It grows when huskd has to treat
/// an agent differently; fields and calls that are merely new do not change it. An
/// agent of a release before there were versions has 0.
pub const PROTOCOL: u32 = 1;

/// Guest port of the [`agent_server::Agent`] service.
pub const GRPC_PORT: u32 = 1024;

/// Guest port of the streams of processes, see [`stream`].
pub const STREAM_PORT: u32 = 1025;

/// Host port to which the agent connects once, when its services listen. The agent
/// sends one line, `READY <microseconds since the kernel started>\n`, and closes the
/// connection.
pub const READY_PORT: u32 = 1023;

/// On the host alone: a connection that stays open for as long as the agent
/// lives, so that its end is known.
pub const LIVENESS_PORT: u32 = 1022;

/// Name of the AppArmor profile of containers that ask for the runtime's default.
pub const DEFAULT_PROFILE: &str = "husk-default";

/// In an OCI configuration, the source of a mount that belongs to the container
/// alone and begins with what the image has at that path. The agent makes the
/// directory beside the container's writable layer.
pub const OWN_DIRECTORY: &str = "own-directory";

/// Paths in the guest that exist after `CreateSandbox`. A supervisor has them in
/// the pod's run directory, which takes the place of [`BASE`](paths::BASE).
pub mod paths {
    /// The directory that has all of them.
    pub const BASE: &str = "/run/husk";
    /// The pod's `/etc/hosts`, bind-mounted into its containers.
    pub const HOSTS: &str = "/run/husk/sandbox/hosts";
    /// The pod's `/etc/hostname`.
    pub const HOSTNAME: &str = "/run/husk/sandbox/hostname";
    /// The pod's `/etc/resolv.conf`.
    pub const RESOLV_CONF: &str = "/run/husk/sandbox/resolv.conf";
    /// The pod's `/dev/shm`, a tmpfs that its containers share.
    pub const SHM: &str = "/run/husk/sandbox/shm";
    /// For a supervisor: sysfs as a pod with a user namespace sees it.
    pub const SYS: &str = "/run/husk/sandbox/sys";
    /// The pod's pid namespace, when its containers share one.
    pub const PID_NAMESPACE: &str = "/run/husk/sandbox/pidns";
    /// The pod's user namespace, if it has one. It then owns the pid namespace above
    /// and the IPC namespace below.
    pub const USER_NAMESPACE: &str = "/run/husk/sandbox/userns";
    /// The programs of hooks.
    pub const HOOKS: &str = "/run/husk/hooks";
    /// The IPC namespace of a pod with a user namespace.
    pub const IPC_NAMESPACE: &str = "/run/husk/sandbox/ipcns";
    /// Volumes that the file server serves, each under its name.
    pub const SHARED: &str = "/run/husk/shared";
    /// The volumes that are copied into the pod, each under its name.
    pub const SYNCED: &str = "/run/husk/live";
    /// Tag of the file system device that has them.
    pub const SHARED_TAG: &str = "husk";
}
