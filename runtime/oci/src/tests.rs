#![allow(clippy::indexing_slicing)]

use oci_spec::image::ConfigBuilder;
use oci_spec::runtime::{Capability, Process};
use proptest::prelude::*;

use super::*;

fn image() -> ImageConfig {
    ConfigBuilder::default()
        .entrypoint(vec!["/entry".to_owned()])
        .cmd(vec!["default".to_owned()])
        .env(vec!["A=image".to_owned(), "B=image".to_owned()])
        .working_dir("/work")
        .user("www-data")
        .build()
        .unwrap()
}

/// The result of `make` for a container that has only these.
fn of<T>(config: &cri::ContainerConfig, image: &ImageConfig, make: impl FnOnce(&Input<'_>) -> T) -> T {
    let metadata = cri::PodSandboxMetadata { name: "the-pod".into(), ..Default::default() };
    let sandbox = cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
    let id = ContainerId::from("c1");
    make(&Input {
        id: &id,
        config,
        sandbox: &sandbox,
        image,
        hooks: &Hooks::default(),
        volumes: &[],
        image_volumes: &[],
        target_pid: None,
        apparmor: None,
        host: None,
    })
}

fn built(config: &cri::ContainerConfig) -> Result<Spec, Error> {
    of(config, &image(), build)
}

fn with_security(security: cri::LinuxContainerSecurityContext) -> cri::ContainerConfig {
    let linux = cri::LinuxContainerConfig { security_context: Some(security), ..Default::default() };
    cri::ContainerConfig { linux: Some(linux), ..Default::default() }
}

fn args_of(command: &[&str], args: &[&str]) -> Vec<String> {
    let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let config = cri::ContainerConfig { command: owned(command), args: owned(args), ..Default::default() };
    built(&config).unwrap().process().as_ref().unwrap().args().clone().unwrap()
}

#[test]
fn command_and_args_replace_the_images_as_kubernetes_says() {
    assert_eq!(args_of(&[], &[]), ["/entry", "default"]);
    assert_eq!(args_of(&[], &["x"]), ["/entry", "x"]);
    assert_eq!(args_of(&["/bin/sh"], &[]), ["/bin/sh"]);
    assert_eq!(args_of(&["/bin/sh"], &["-c", "true"]), ["/bin/sh", "-c", "true"]);
}

#[test]
fn a_clients_variable_wins_over_the_images() {
    let envs = vec![cri::KeyValue { key: "A".into(), value: "client=1".into() }];
    let spec = built(&cri::ContainerConfig { envs, ..Default::default() }).unwrap();
    let env = spec.process().as_ref().unwrap().env().clone().unwrap();
    assert!(env.contains(&"A=client=1".to_owned()) && env.contains(&"B=image".to_owned()), "{env:?}");
    assert_eq!(env.iter().filter(|variable| variable.starts_with("A=")).count(), 1);
    assert!(env.contains(&"HOSTNAME=the-pod".to_owned()), "the pod's own name: {env:?}");
}

fn process_of(config: &cri::ContainerConfig, image: &ImageConfig) -> Result<Process, Error> {
    of(config, image, build).map(|spec| spec.process().clone().unwrap())
}

#[test]
fn an_entrypoint_of_one_empty_word_is_none() {
    let image = |entrypoint: &[&str]| {
        let entrypoint: Vec<_> = entrypoint.iter().map(|word| (*word).to_owned()).collect();
        ConfigBuilder::default().entrypoint(entrypoint).cmd(vec!["/run".to_owned()]).build().unwrap()
    };
    let none = cri::ContainerConfig::default();
    assert_eq!(process_of(&none, &image(&[""])).unwrap().args().clone().unwrap(), ["/run"]);
    let args = cri::ContainerConfig { args: vec!["/mine".into()], ..Default::default() };
    assert_eq!(process_of(&args, &image(&[""])).unwrap().args().clone().unwrap(), ["/mine"]);
    for entrypoint in [&["", "x"][..], &["", ""]] {
        assert!(process_of(&none, &image(entrypoint)).unwrap_err().to_string().contains("no command"));
    }
}

#[test]
fn a_variable_without_a_value_unsets_an_earlier_one() {
    let env = ["A=1", "B", "A", "C=3", "HOSTNAME", "D=4", "D", "D=5"].map(str::to_owned).to_vec();
    let image = ConfigBuilder::default().cmd(vec!["/run".to_owned()]).env(env).build().unwrap();
    let process = process_of(&cri::ContainerConfig::default(), &image).unwrap();
    let env = process.env().clone().unwrap();
    assert!(env[0].starts_with("PATH="), "{env:?}");
    assert_eq!(env[1..], ["C=3", "D=5"]);
}

fn with_variables(count: usize, value: &str) -> cri::ContainerConfig {
    let variable =
        |number| cri::KeyValue { key: format!("SERVICE_{number}_HOST"), value: value.to_owned().into() };
    cri::ContainerConfig { envs: (0..count).map(variable).collect(), ..Default::default() }
}

#[test]
fn as_many_variables_as_linux_takes_cost_no_time() {
    let start = std::time::Instant::now();
    let process = process_of(&with_variables(15_000, "10.96.0.1"), &image()).unwrap();
    assert_eq!(process.env().as_ref().unwrap().len(), 15_004);
    assert!(start.elapsed() < std::time::Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn more_than_a_program_can_be_started_with_is_refused_by_name() {
    let error = process_of(&with_variables(60_000, "10.96.0.1"), &image()).unwrap_err().to_string();
    assert!(error.contains("ARG_MAX") && error.contains("60004 variables"), "{error}");
    let error = process_of(&with_variables(1, &"x".repeat(128 << 10)), &image()).unwrap_err().to_string();
    assert!(error.contains("MAX_ARG_STRLEN") && error.contains("`SERVICE_0_HOST="), "{error}");
    process_of(&with_variables(1, &"x".repeat(127 << 10)), &image()).unwrap();
}

#[test]
fn capabilities_are_added_and_dropped_by_name() {
    let bounding = |add: &[&str], drop: &[&str]| {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let capabilities = cri::Capability {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            ..Default::default()
        };
        let config = with_security(cri::LinuxContainerSecurityContext {
            capabilities: Some(capabilities),
            ..Default::default()
        });
        built(&config).map(|spec| {
            spec.process().as_ref().unwrap().capabilities().as_ref().unwrap().bounding().clone().unwrap()
        })
    };
    assert!(!bounding(&[], &[]).unwrap().contains(&Capability::SysAdmin));
    assert!(bounding(&["sys_admin"], &[]).unwrap().contains(&Capability::SysAdmin));
    assert_eq!(bounding(&["CAP_CHOWN"], &["ALL"]).unwrap(), [Capability::Chown].into());
    let all_but = bounding(&["ALL"], &["NET_RAW"]).unwrap();
    assert!(all_but.contains(&Capability::SysBoot) && !all_but.contains(&Capability::NetRaw));
    assert!(bounding(&["SYS_WHATEVER"], &[]).unwrap_err().to_string().contains("SYS_WHATEVER"));
}

#[test]
fn what_the_machine_shares_is_not_made_again() {
    let spec = built(&cri::ContainerConfig::default()).unwrap();
    assert_eq!(spec.hostname(), &None);
    let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
    let shared = [LinuxNamespaceType::Uts, LinuxNamespaceType::Network, LinuxNamespaceType::Ipc];
    assert!(namespaces.iter().all(|namespace| !shared.contains(&namespace.typ())), "{namespaces:?}");
}

#[test]
fn what_an_image_declares_as_a_volume_can_be_written() {
    let volumes = ["/etc".to_owned(), "/proc".to_owned()];
    let image = ConfigBuilder::default().volumes(volumes).cmd(["true".to_owned()]).build().unwrap();
    let security = cri::LinuxContainerSecurityContext { readonly_rootfs: true, ..Default::default() };
    let spec = of(&with_security(security), &image, build).unwrap();
    let mounts = spec.mounts().clone().unwrap();
    let own: Vec<_> = mounts.iter().filter(|mount| mounts::is_own_directory(mount)).collect();
    assert_eq!(own.len(), 1, "{own:?}");
    assert_eq!(own[0].destination(), std::path::Path::new("/etc"));
    assert!(own[0].options().as_ref().unwrap().contains(&"rw".to_owned()));
    let after = mounts.iter().skip_while(|mount| !mounts::is_own_directory(mount));
    assert!({ after }.any(|mount| mount.destination().ends_with("etc/hosts")), "{mounts:?}");
}

#[test]
fn paths_are_masked_as_the_client_says_and_not_for_the_privileged() {
    let paths = |privileged, masked: &[&str]| {
        let masked_paths: Vec<_> = masked.iter().map(|path| (*path).to_owned()).collect();
        let security = cri::LinuxContainerSecurityContext {
            privileged,
            readonly_paths: masked_paths.clone(),
            masked_paths,
            ..Default::default()
        };
        let spec = built(&with_security(security)).unwrap();
        let linux = spec.linux().clone().unwrap();
        assert_eq!(linux.masked_paths(), linux.readonly_paths());
        linux.masked_paths().clone().unwrap()
    };
    assert_eq!(paths(false, &["/proc/kcore"]), ["/proc/kcore"]);
    assert!(paths(false, &[]).is_empty(), "the kubelet's words for procMount: Unmasked");
    assert!(paths(true, &["/proc/kcore"]).is_empty());
}

#[test]
fn a_privileged_container_sees_all_control_groups() {
    for privileged in [false, true] {
        let spec =
            built(&with_security(cri::LinuxContainerSecurityContext { privileged, ..Default::default() }));
        let namespaces = spec.unwrap().linux().as_ref().unwrap().namespaces().clone().unwrap();
        let own = namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup);
        assert_eq!(own, !privileged);
    }
}

#[test]
fn a_user_comes_from_the_client_or_else_the_image() {
    let of = |security| of(&with_security(security), &image(), user);
    let value = |value| Some(cri::Int64Value { value });
    assert_eq!(of(Default::default()).unwrap().user, "www-data");
    let both = cri::LinuxContainerSecurityContext {
        run_as_user: value(7),
        run_as_group: value(8),
        ..Default::default()
    };
    assert_eq!(of(both).unwrap().user, "7:8");
    let group = cri::LinuxContainerSecurityContext { run_as_group: value(8), ..Default::default() };
    assert!(of(group).is_err());
    let negative = cri::LinuxContainerSecurityContext { run_as_user: value(-1), ..Default::default() };
    assert!(of(negative).unwrap_err().to_string().contains("-1"));
}

proptest! {
    /// The answer to any numbers is a configuration or an error.
    #[test]
    fn any_numbers_give_a_configuration_or_an_error(
        shares in any::<i64>(), quota in any::<i64>(), period in any::<i64>(), memory in any::<i64>(),
        score in any::<i64>(), pid in any::<i32>(), huge in any::<u64>(),
    ) {
        let resources = cri::LinuxContainerResources {
            cpu_shares: shares, cpu_quota: quota, cpu_period: period, memory_limit_in_bytes: memory, oom_score_adj: score,
            hugepage_limits: vec![cri::HugepageLimit { page_size: "2MB".into(), limit: huge }],
            ..Default::default()
        };
        let options = cri::NamespaceOption { pid, ..Default::default() };
        let security = cri::LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
        let linux = cri::LinuxContainerConfig { resources: Some(resources), security_context: Some(security) };
        let _ = built(&cri::ContainerConfig { linux: Some(linux), ..Default::default() });
    }

    /// The answer to any security context is an error, or a configuration that keeps the rules
    /// of every container.
    #[test]
    fn any_security_context_stays_in_the_machine(
        privileged in any::<bool>(), modes in prop::array::uniform3(-1..5i32), userns in prop::option::of((-1..5i32, 0..3usize)),
        names in prop::collection::vec("(CAP_)?[a-zA-Z_]{0,12}|ALL|SYS_ADMIN", 0..4), name in "\\PC{0,12}",
        uid in prop::option::of(any::<i64>()), gid in prop::option::of(any::<i64>()),
        paths in prop::collection::vec("\\PC{0,12}", 0..3), unified in "\\PC{0,12}",
        profile in prop::option::of((-1..4i32, "[a-z/.]{0,10}")), value in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        let ids = |count| vec![cri::IdMapping { host_id: 1000, container_id: 0, length: 65536 }; count];
        let options = cri::NamespaceOption {
            network: modes[0],
            pid: modes[1],
            ipc: modes[2],
            userns_options: userns.map(|(mode, count)| cri::UserNamespace { mode, uids: ids(count), gids: ids(count) }),
            ..Default::default()
        };
        let security = cri::LinuxContainerSecurityContext {
            privileged,
            namespace_options: Some(options.clone()),
            capabilities: Some(cri::Capability {
                add_capabilities: names.clone(),
                drop_capabilities: names.clone(),
                add_ambient_capabilities: names,
            }),
            run_as_user: uid.map(|value| cri::Int64Value { value }),
            run_as_group: gid.map(|value| cri::Int64Value { value }),
            run_as_username: name,
            masked_paths: paths.clone(),
            readonly_paths: paths,
            seccomp: profile
                .map(|(profile_type, localhost_ref)| cri::SecurityProfile { profile_type, localhost_ref }),
            ..Default::default()
        };
        let resources = cri::LinuxContainerResources { unified: [(unified.clone(), unified)].into(), ..Default::default() };
        let linux = cri::LinuxContainerConfig { resources: Some(resources), security_context: Some(security.clone()) };
        let envs = vec![cri::KeyValue { key: "K".into(), value }];
        let config = cri::ContainerConfig { linux: Some(linux), envs, ..Default::default() };
        let sandbox_security =
            cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let sandbox = cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig { security_context: Some(sandbox_security), ..Default::default() }),
            ..Default::default()
        };
        let (id, image) = (ContainerId::from("c"), image());
        let input = Input {
            id: &id, config: &config, sandbox: &sandbox, image: &image, hooks: &Hooks::default(), volumes: &[], image_volumes: &[], target_pid: Some(7), apparmor: None, host: None,
        };
        let _ = user(&input);
        let Ok(spec) = build(&input) else { return Ok(()) };
        prop_assert!(!modes.contains(&(NamespaceMode::Node as i32)));
        let linux = spec.linux().as_ref().unwrap();
        for namespace in linux.namespaces().as_ref().unwrap() {
            let path = namespace.path().clone().unwrap_or_default();
            prop_assert!(
                path.as_os_str().is_empty() || path.starts_with("/run/husk/sandbox") || path.starts_with("/proc/7/ns"),
                "{path:?}"
            );
        }
        let hidden = if privileged { Vec::new() } else { security.masked_paths };
        prop_assert_eq!(linux.masked_paths().as_ref().unwrap(), &hidden);
        if !privileged {
            let devices = linux.resources().as_ref().unwrap().devices().clone().unwrap();
            prop_assert!(devices.iter().all(|rule| !rule.allow() || rule.major().is_some()), "{devices:?}");
        }
    }
}
