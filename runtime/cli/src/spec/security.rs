//! Flags of what a container may do.

use anyhow::{Context, bail};
use husk_proto::cri::security_profile::ProfileType;
use husk_proto::cri::{self, NamespaceMode};

use super::{Plan, pairs};

/// Paths of /proc and /sys that a container cannot see, as docker has it.
const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Paths that a container can only read.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Capabilities, profiles, namespaces.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Security")]
pub struct Security {
    /// Add a capability, or ALL.
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    /// Take a capability away, or ALL.
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// Let the container do everything in its VM; on the host, under a handler of host containers.
    #[arg(long)]
    privileged: bool,
    /// `no-new-privileges`, `seccomp=unconfined|FILE`, `apparmor=unconfined|PROFILE`, `systempaths=unconfined`.
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Set a kernel parameter of the pod.
    #[arg(long, value_name = "KEY=VALUE")]
    sysctl: Vec<String>,
    /// The pid namespace: `private`, `pod`, `host`, or `container:ID` of the same pod.
    #[arg(long, default_value = "private")]
    pid: String,
    /// The ipc namespace: `private`, `shareable` with its pod, or `host`.
    #[arg(long, default_value = "shareable")]
    ipc: String,
    /// The user namespace: `host` for none of its own.
    #[arg(long, default_value = "host")]
    userns: String,
}

impl Security {
    pub(super) fn apply(&self, plan: &mut Plan) -> anyhow::Result<()> {
        plan.pod_security.privileged = self.privileged;
        let security = &mut plan.container_security;
        security.privileged = self.privileged;
        security.capabilities = Some(cri::Capability {
            add_capabilities: capabilities(&self.cap_add),
            drop_capabilities: capabilities(&self.cap_drop),
            ..Default::default()
        });
        if !self.privileged {
            security.seccomp = Some(profile(ProfileType::RuntimeDefault, ""));
            security.masked_paths = MASKED.map(str::to_owned).into();
            security.readonly_paths = READ_ONLY.map(str::to_owned).into();
        }
        for option in &self.security_opt {
            set_option(security, option)?;
        }
        plan.pod_linux.sysctls = pairs(&self.sysctl).collect();
        self.set_namespaces(plan)
    }

    fn set_namespaces(&self, plan: &mut Plan) -> anyhow::Result<()> {
        if self.userns != "host" {
            bail!(
                "--userns {}: CRI wants the numbers of the users, and husk does not choose them yet",
                self.userns
            );
        }
        let (pid, target) = match self.pid.as_str() {
            "private" => (NamespaceMode::Container, ""),
            "pod" => (NamespaceMode::Pod, ""),
            "host" => (NamespaceMode::Node, ""),
            other => match other.strip_prefix("container:") {
                Some(target) => (NamespaceMode::Target, target),
                None => bail!("--pid {other}: there are private, pod, host and container:ID"),
            },
        };
        let ipc = match self.ipc.as_str() {
            "private" => NamespaceMode::Container,
            "shareable" | "pod" => NamespaceMode::Pod,
            "host" => NamespaceMode::Node,
            other => bail!("--ipc {other}: there are private, shareable and host"),
        };
        let [pod, container] = namespaces(plan);
        (pod.ipc, container.ipc) = (ipc.into(), ipc.into());
        container.pid = pid.into();
        target.clone_into(&mut container.target_id);
        // Another container is nothing that a pod can have.
        pod.pid = if pid == NamespaceMode::Target { NamespaceMode::Container.into() } else { pid.into() };
        Ok(())
    }

    pub(super) fn flag_of_pod(&self) -> Option<&'static str> {
        (!self.sysctl.is_empty()).then_some("--sysctl")
    }
}

/// The namespaces of the pod and of the container.
pub(super) fn namespaces(plan: &mut Plan) -> [&mut cri::NamespaceOption; 2] {
    [
        plan.pod_security.namespace_options.get_or_insert_default(),
        plan.container_security.namespace_options.get_or_insert_default(),
    ]
}

/// Capabilities by the names that CRI has for them, without `CAP_`.
fn capabilities(given: &[String]) -> Vec<String> {
    let bare = |name: &String| name.to_ascii_uppercase().trim_start_matches("CAP_").to_owned();
    given.iter().map(bare).collect()
}

fn profile(kind: ProfileType, path: &str) -> cri::SecurityProfile {
    cri::SecurityProfile { profile_type: kind.into(), localhost_ref: path.to_owned() }
}

/// Reads one `--security-opt`.
fn set_option(security: &mut cri::LinuxContainerSecurityContext, option: &str) -> anyhow::Result<()> {
    let (key, value) = option.split_once(['=', ':']).unwrap_or((option, "true"));
    match (key, value) {
        ("no-new-privileges", "true") => security.no_new_privs = true,
        ("no-new-privileges", "false") => security.no_new_privs = false,
        ("seccomp", "unconfined") => security.seccomp = Some(profile(ProfileType::Unconfined, "")),
        ("seccomp", "builtin") => security.seccomp = Some(profile(ProfileType::RuntimeDefault, "")),
        ("seccomp", file) => {
            let file = std::path::absolute(file).with_context(|| format!("--security-opt {option}"))?;
            security.seccomp = Some(profile(ProfileType::Localhost, &file.display().to_string()));
        }
        ("apparmor", "unconfined") => security.apparmor = Some(profile(ProfileType::Unconfined, "")),
        ("apparmor", name) => security.apparmor = Some(profile(ProfileType::Localhost, name)),
        ("systempaths", "unconfined") => {
            security.masked_paths.clear();
            security.readonly_paths.clear();
        }
        ("label", "disable") => {}
        ("label", _) => bail!("--security-opt {option}: guests have no SELinux"),
        _ => bail!(
            "--security-opt {option}: there are no-new-privileges, seccomp, apparmor and systempaths=unconfined"
        ),
    }
    Ok(())
}
