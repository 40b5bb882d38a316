//! Checks of a pod's configuration: a field that cannot be honoured is refused by its
//! name before anything is made. `docs/cri-fields.md` lists every field.

use husk_config::{Handler, Kind, Limits};
use husk_network::{self as network, Bandwidth};
use husk_oci as oci;
use husk_proto::cri;

use crate::{Error, Node};

/// Longest host name (Linux, `HOST_NAME_MAX`).
const MAX_HOSTNAME: usize = 64;

/// Checks a pod's configuration.
///
/// # Errors
/// The error names the field that cannot be honoured.
pub(crate) fn check(node: &Node, config: &cri::PodSandboxConfig, kind: Kind) -> Result<(), Error> {
    check_namespaces(config, node, kind)?;
    check_config(config, kind)
}

/// A pod in a virtual machine is refused the host's namespaces with the name of
/// the handler that has them.
fn check_namespaces(config: &cri::PodSandboxConfig, node: &Node, kind: Kind) -> Result<(), Error> {
    if kind == Kind::Host {
        return Ok(());
    }
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = security.and_then(|security| security.namespace_options.as_ref());
    for (what, mode) in [
        ("network", options.map(|options| options.network)),
        ("pid", options.map(|options| options.pid)),
        ("ipc", options.map(|options| options.ipc)),
    ] {
        if mode == Some(cri::NamespaceMode::Node as i32) {
            return Err(Error::Invalid(format!(
                "the pod asks for the host's {what} namespace, which a pod in a virtual machine cannot have: {}",
                instead(node)
            )));
        }
    }
    Ok(())
}

/// The handler that runs what a virtual machine cannot.
fn instead(node: &Node) -> String {
    match node.config.handlers.iter().find(|(_, handler)| handler.host().is_some()) {
        Some((name, _)) => format!("run it with the runtime handler `{name}`"),
        None => "no handler of kind `host` is enabled in the configuration".into(),
    }
}

fn check_config(config: &cri::PodSandboxConfig, kind: Kind) -> Result<(), Error> {
    if config.metadata.as_ref().is_none_or(|metadata| metadata.name.is_empty()) {
        return Err(Error::Invalid("sandbox metadata needs a name".into()));
    }
    if config.windows.is_some() {
        return Err(Error::Invalid("sandbox `windows`: this runtime has Linux pods".into()));
    }
    if config.hostname.len() > MAX_HOSTNAME {
        return Err(Error::Invalid(format!("sandbox `hostname` has more than {MAX_HOSTNAME} bytes")));
    }
    bandwidth(config)?;
    let Some(security) = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref()) else {
        return Ok(());
    };
    let on_host = kind == Kind::Host;
    oci::selinux(security.selinux_options.as_ref())?;
    if let Some(options) = &security.namespace_options {
        oci::shareable(options, on_host)?;
        let shared = [options.network, options.pid, options.ipc].contains(&(cri::NamespaceMode::Node as i32));
        if oci::user_namespace(config)?.is_some() && shared {
            return Err(Error::Invalid(
                "sandbox `userns_options`: a pod in the host's network, pid or ipc namespace has the host's users"
                    .into(),
            ));
        }
        if options.pid == cri::NamespaceMode::Target as i32 {
            return Err(Error::Invalid(
                "sandbox pid namespace mode TARGET: a pod has no container to share one with yet".into(),
            ));
        }
    }
    Ok(())
}

/// The rates at which the pod may send and receive. Kubernetes has annotations for
/// them, and no fields.
///
/// # Errors
/// The error names the annotation that is no rate.
pub(crate) fn bandwidth(config: &cri::PodSandboxConfig) -> Result<Bandwidth, Error> {
    let rate = |name: &str| {
        let rate = config.annotations.get(name).map(|text| network::rate(text)).transpose();
        rate.map_err(|why| Error::Invalid(format!("annotation `{name}`: {why}")))
    };
    Ok(Bandwidth {
        ingress: rate("kubernetes.io/ingress-bandwidth")?,
        egress: rate("kubernetes.io/egress-bandwidth")?,
    })
}

/// How an annotation begins that lowers a rate limit of the pod; a device follows.
const LIMIT: &str = "husk.dev/limits.";

/// How much the pod's devices may do: as its handler has it, or less where an annotation
/// asks for less.
///
/// # Errors
/// The error names the annotation that is no limit, or that a host pod has.
pub(crate) fn limits(config: &cri::PodSandboxConfig, handler: &Handler) -> Result<Limits, Error> {
    let mut limits = handler.vm().map(|vm| vm.limits.clone()).unwrap_or_default();
    for (name, text) in &config.annotations {
        let Some(device) = name.strip_prefix(LIMIT) else { continue };
        let wrong = |why: String| Error::Invalid(format!("annotation `{name}`: {why}"));
        if handler.kind() == Kind::Host {
            return Err(wrong("the devices of a pod without a virtual machine have no limits".into()));
        }
        limits.lower(device, text).map_err(wrong)?;
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use husk_proto::cri::NamespaceMode;

    use super::*;

    fn checked(security: cri::LinuxSandboxSecurityContext) -> Result<(), String> {
        checked_for(Kind::Vm, security)
    }

    fn checked_for(kind: Kind, security: cri::LinuxSandboxSecurityContext) -> Result<(), String> {
        let metadata = cri::PodSandboxMetadata { name: "pod".into(), ..Default::default() };
        let linux = cri::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() };
        let config =
            cri::PodSandboxConfig { metadata: Some(metadata), linux: Some(linux), ..Default::default() };
        check_config(&config, kind).map_err(|error| error.to_string())
    }

    fn with_namespaces(options: cri::NamespaceOption) -> Result<(), String> {
        checked(cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() })
    }

    #[test]
    fn what_needs_the_hosts_kernel_is_refused_by_name() {
        let node = NamespaceMode::Node as i32;
        for (options, word) in [
            (cri::NamespaceOption { network: node, ..Default::default() }, "host's network namespace"),
            (cri::NamespaceOption { pid: node, ..Default::default() }, "host's pid namespace"),
            (cri::NamespaceOption { ipc: node, ..Default::default() }, "host's ipc namespace"),
            (cri::NamespaceOption { pid: NamespaceMode::Target as i32, ..Default::default() }, "TARGET"),
            (cri::NamespaceOption { ipc: NamespaceMode::Target as i32, ..Default::default() }, "ipc"),
            (
                cri::NamespaceOption { network: NamespaceMode::Container as i32, ..Default::default() },
                "network",
            ),
            (cri::NamespaceOption { pid: 77, ..Default::default() }, "77"),
        ] {
            let error = with_namespaces(options).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let selinux = cri::SeLinuxOption { r#type: "container_t".into(), ..Default::default() };
        let selinux =
            cri::LinuxSandboxSecurityContext { selinux_options: Some(selinux), ..Default::default() };
        assert!(checked(selinux).unwrap_err().contains("selinux_options"));
        assert!(check_config(&cri::PodSandboxConfig::default(), Kind::Host).is_err());
    }

    #[test]
    fn users_of_its_own_are_for_a_pod_with_namespaces_of_its_own() {
        let range = vec![cri::IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
        let users = cri::UserNamespace { mode: NamespaceMode::Pod as i32, uids: range.clone(), gids: range };
        let on_host = |options: cri::NamespaceOption| {
            let options = cri::NamespaceOption { userns_options: Some(users.clone()), ..options };
            let security =
                cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
            checked_for(Kind::Host, security)
        };
        on_host(cri::NamespaceOption::default()).unwrap();
        let node = NamespaceMode::Node as i32;
        for options in [
            cri::NamespaceOption { network: node, ..Default::default() },
            cri::NamespaceOption { pid: node, ..Default::default() },
            cri::NamespaceOption { ipc: node, ..Default::default() },
        ] {
            assert!(on_host(options).unwrap_err().contains("userns_options"));
        }
    }

    #[test]
    fn what_is_for_other_systems_or_too_long_is_refused() {
        let metadata = Some(cri::PodSandboxMetadata { name: "pod".into(), ..Default::default() });
        let windows = cri::PodSandboxConfig {
            metadata: metadata.clone(),
            windows: Some(cri::WindowsPodSandboxConfig::default()),
            ..Default::default()
        };
        assert!(check_config(&windows, Kind::Vm).unwrap_err().to_string().contains("windows"));
        let named = |length| cri::PodSandboxConfig {
            metadata: metadata.clone(),
            hostname: "x".repeat(length),
            ..Default::default()
        };
        check_config(&named(64), Kind::Vm).unwrap();
        assert!(check_config(&named(65), Kind::Vm).unwrap_err().to_string().contains("hostname"));
    }

    #[test]
    fn bandwidth_is_in_annotations() {
        let of = |name: &str, value: &str| {
            let annotations = [(name.to_owned(), value.to_owned())].into();
            let metadata = Some(cri::PodSandboxMetadata { name: "pod".into(), ..Default::default() });
            cri::PodSandboxConfig { metadata, annotations, ..Default::default() }
        };
        let slow = of("kubernetes.io/egress-bandwidth", "2M");
        assert_eq!(bandwidth(&slow).unwrap(), Bandwidth { ingress: None, egress: Some(2_000_000) });
        let wrong = of("kubernetes.io/ingress-bandwidth", "fast");
        assert!(
            check_config(&wrong, Kind::Vm)
                .unwrap_err()
                .to_string()
                .contains("kubernetes.io/ingress-bandwidth")
        );
    }

    #[test]
    fn an_annotation_lowers_a_limit_of_its_pod() {
        let of = |name: &str, text: &str| cri::PodSandboxConfig {
            annotations: [(name.to_owned(), text.to_owned()), ("husk.dev/other".into(), "x".into())].into(),
            ..Default::default()
        };
        let handler = Handler::default_of(Kind::Vm);
        let lowered = limits(&of("husk.dev/limits.flush", "operations_per_second = 20"), &handler).unwrap();
        assert_eq!(lowered.flush.unwrap().operations_per_second, 20);
        assert_eq!(Limits { flush: None, ..lowered }, Limits::default());
        let error = limits(&of("husk.dev/limits.flush", "often"), &handler).unwrap_err().to_string();
        assert!(error.contains("`husk.dev/limits.flush`") && error.contains("`often`"), "{error}");
        let on_host = Handler::default_of(Kind::Host);
        let error = limits(&of("husk.dev/limits.disk", "bytes_per_second = 1"), &on_host).unwrap_err();
        assert!(error.to_string().contains("`husk.dev/limits.disk`"), "{error}");
    }

    #[test]
    fn what_a_machine_has_is_fine() {
        with_namespaces(cri::NamespaceOption::default()).unwrap();
        let own = NamespaceMode::Container as i32;
        with_namespaces(cri::NamespaceOption { pid: own, ipc: own, ..Default::default() }).unwrap();
        checked(cri::LinuxSandboxSecurityContext::default()).unwrap();
    }
}
