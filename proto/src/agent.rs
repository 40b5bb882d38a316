//! The interface between huskd and husk-agent: the gRPC service, vsock ports,
//! the paths in the guest that a container's OCI configuration may name, and
//! the header that opens a standard stream.

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

/// The guest's port of the [`agent_server::Agent`] service.
pub const GRPC_PORT: u32 = 1024;

/// The guest's port of the streams of processes, see [`stream`].
pub const STREAM_PORT: u32 = 1025;

/// The host's port to which the agent connects once, when its services listen. The
/// agent sends one line, `READY <microseconds since the kernel started>\n`, and
/// closes the connection.
pub const READY_PORT: u32 = 1023;

/// The port of a connection that stays open for as long as the agent lives, so
/// that its end is noticed. Only agents on the host have it.
pub const LIVENESS_PORT: u32 = 1022;

/// The name of the AppArmor profile of containers that ask for the runtime's
/// default.
pub const DEFAULT_PROFILE: &str = "husk-default";

/// The source, in an OCI configuration, of a mount that belongs to the
/// container alone and begins with the image's content at that path. The agent
/// makes the directory beside the container's writable layer.
pub const OWN_DIRECTORY: &str = "own-directory";

/// Paths in the guest that exist after `CreateSandbox`. A supervisor has them in
/// the pod's run directory, which takes the place of [`BASE`](paths::BASE).
pub mod paths {
    /// The directory of all these paths.
    pub const BASE: &str = "/run/husk";
    /// The pod's `/etc/hosts`, bind-mounted into its containers.
    pub const HOSTS: &str = "/run/husk/sandbox/hosts";
    /// The pod's `/etc/hostname`.
    pub const HOSTNAME: &str = "/run/husk/sandbox/hostname";
    /// The pod's `/etc/resolv.conf`.
    pub const RESOLV_CONF: &str = "/run/husk/sandbox/resolv.conf";
    /// The pod's `/dev/shm`, a tmpfs that its containers share.
    pub const SHM: &str = "/run/husk/sandbox/shm";
    /// For a supervisor: a sysfs mount that belongs to the pod's user
    /// namespace.
    pub const SYS: &str = "/run/husk/sandbox/sys";
    /// The pod's pid namespace, when its containers share one.
    pub const PID_NAMESPACE: &str = "/run/husk/sandbox/pidns";
    /// The pod's user namespace, if it has one. It then owns the pid namespace above
    /// and the IPC namespace below.
    pub const USER_NAMESPACE: &str = "/run/husk/sandbox/userns";
    /// The directory of the hooks' programs.
    pub const HOOKS: &str = "/run/husk/hooks";
    /// The IPC namespace of a pod with a user namespace.
    pub const IPC_NAMESPACE: &str = "/run/husk/sandbox/ipcns";
    /// The volumes of the file server, each under its name.
    pub const SHARED: &str = "/run/husk/shared";
    /// The synced volumes, which huskd copies into the pod, each under its
    /// name.
    pub const SYNCED: &str = "/run/husk/live";
    /// The tag of the file system device of [`SHARED`].
    pub const SHARED_TAG: &str = "husk";
}
