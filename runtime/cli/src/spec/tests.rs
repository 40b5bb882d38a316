//! Flags, and the requests that they make.

use clap::Parser;
use husk_proto::cri::security_profile::ProfileType;
use husk_proto::cri::{NamespaceMode, Protocol, Signal};

use super::*;
use crate::labels;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    flags: Flags,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

fn plan(line: &str) -> anyhow::Result<Plan> {
    let line = Line::try_parse_from(["run"].into_iter().chain(line.split_whitespace()))?;
    if let Some(refused) = no_image(&line.words) {
        anyhow::bail!(refused);
    }
    line.flags.plan(&line.words[0], &line.words[1..])
}

fn security(plan: &Plan) -> cri::LinuxContainerSecurityContext {
    plan.container.linux.clone().unwrap().security_context.unwrap()
}

fn refused(line: &str) -> String {
    format!("{:#}", plan(line).unwrap_err())
}

#[test]
fn the_container_and_its_pod_have_one_name() {
    let plan = plan("--name web -l app=shop -l bare --annotation husk.dev/x=1 nginx").unwrap();
    let pod = plan.pod.metadata.unwrap();
    assert_eq!((pod.name.as_str(), pod.uid.as_str(), pod.namespace.as_str()), ("web", "web", "husk"));
    assert_eq!(plan.container.metadata.unwrap().name, "web");
    assert_eq!([&plan.container.labels[labels::NAME], &plan.pod.labels[labels::NAME]], ["web", "web"]);
    assert_eq!([&plan.container.labels["app"], &plan.container.labels["bare"]], ["shop", ""]);
    assert_eq!(plan.pod.annotations["husk.dev/x"], "1");
    assert_eq!(plan.container.image.unwrap().image, "nginx");
    assert!(refused("--name a/b nginx").contains("a name has letters"));
}

#[test]
fn words_after_the_image_are_the_commands_own() {
    let words = plan("-e A=1 busybox sh -c -e --name x").unwrap().container;
    assert_eq!((words.command.len(), words.args.join(" ")), (0, "sh -c -e --name x".to_owned()));
    let entry = plan("--entrypoint /bin/sh busybox -c true").unwrap().container;
    assert_eq!((entry.command.join(" "), entry.args.join(" ")), ("/bin/sh".into(), "-c true".into()));
    let none = plan("--entrypoint= busybox true").unwrap().container;
    assert_eq!((none.command.join(" "), none.args.len()), ("true".into(), 0));
    assert!(refused("--entrypoint= busybox").contains("no program is left"));
}

#[test]
fn variables_come_from_flags_and_files_and_flags_win() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "# comment\n\nA=file\nB=b c\nHUSK_NO_SUCH_VARIABLE\n").unwrap();
    let line =
        format!("--env-file {} -e A=flag -e PATH -e HUSK_NO_SUCH_VARIABLE busybox", file.path().display());
    let envs = plan(&line).unwrap().container.envs;
    let texts: Vec<String> =
        envs.iter().map(|one| format!("{}={}", one.key, String::from_utf8_lossy(&one.value))).collect();
    assert_eq!(texts[..3], ["A=file", "B=b c", "A=flag"]);
    assert!(texts[3].starts_with("PATH=/") && texts.len() == 4);
    assert!(refused("-e =x busybox").contains("no name"));
    assert!(refused("--env-file /no/such busybox").contains("read /no/such"));
}

#[test]
fn a_process_has_its_user_and_streams_and_end() {
    let line = "-it -u 5:6 --group-add 7 -w /tmp --stop-signal QUIT --stop-timeout 3 busybox";
    let wanted = plan(line).unwrap();
    let config = &wanted.container;
    assert!(config.stdin && config.tty);
    assert_eq!((config.working_dir.as_str(), config.stop_signal()), ("/tmp", Signal::Sigquit));
    assert_eq!(config.annotations[labels::STOP_TIMEOUT], "3");
    let process = security(&wanted);
    assert_eq!((process.run_as_user.unwrap().value, process.run_as_group.unwrap().value), (5, 6));
    assert_eq!(process.supplemental_groups, [7]);
    assert_eq!(security(&plan("-u nobody busybox").unwrap()).run_as_username, "nobody");
    assert!(refused("-u nobody:staff busybox").contains("by its number"));
    assert!(refused("-u :5 busybox").contains("no user"));
    assert!(refused("--stop-signal FOO busybox").contains("no signal"));
}

#[test]
fn limits_are_the_containers_and_size_its_machine() {
    let wanted =
        plan("-m 512m --memory-swap 1g --cpus 1.5 --pids-limit 100 --cpuset-cpus 0-1 busybox").unwrap();
    let limits = wanted.container.linux.unwrap().resources.unwrap();
    assert_eq!((limits.memory_limit_in_bytes, limits.memory_swap_limit_in_bytes), (512 << 20, 1 << 30));
    assert_eq!((limits.cpu_quota, limits.cpu_period, limits.cpuset_cpus.as_str()), (150_000, 100_000, "0-1"));
    assert_eq!(limits.unified["pids.max"], "100");
    let machine = wanted.pod.linux.unwrap().resources.unwrap();
    assert_eq!((machine.memory_limit_in_bytes, machine.cpu_quota), (512 << 20, 150_000));
    assert!(plan("busybox").unwrap().pod.linux.unwrap().resources.is_none());
    for (line, error) in [
        ("--memory-swap 1g busybox", "needs --memory"),
        ("-m 2g --memory-swap 1g busybox", "is not less"),
        ("-m lots busybox", "no amount of bytes"),
        ("--cpus 0 busybox", "--cpus 0"),
    ] {
        assert!(refused(line).contains(error), "{line}");
    }
}

#[test]
fn the_pod_has_the_network() {
    let wanted = plan(
        "-p 8080:80 -p 53:53/udp --hostname box --dns 1.1.1.1 --dns-search lan --add-host db:10.0.0.7 x",
    )
    .unwrap();
    let ports: Vec<_> = wanted.pod.port_mappings.iter().map(|one| (one.host_port, one.protocol())).collect();
    assert_eq!(ports, [(8080, Protocol::Tcp), (53, Protocol::Udp)]);
    assert_eq!((wanted.pod.hostname.as_str(), wanted.hosts[0].as_str()), ("box", "10.0.0.7\tdb"));
    let dns = wanted.pod.dns_config.unwrap();
    assert_eq!((dns.servers.join(""), dns.searches.join("")), ("1.1.1.1".into(), "lan".into()));
    let host = plan("--network host x").unwrap();
    assert_eq!(security(&host).namespace_options.unwrap().network(), NamespaceMode::Node);
    let pod = host.pod.linux.unwrap().security_context.unwrap();
    assert_eq!(pod.namespace_options.unwrap().network(), NamespaceMode::Node);
    for (line, error) in [
        ("--network none x", "without a network"),
        ("--network mine x", "CNI's configuration"),
        ("--add-host db x", "NAME:ADDRESS"),
        ("--add-host db:gateway x", "no IP address"),
        ("-p 99999:80 x", "no port"),
    ] {
        assert!(refused(line).contains(error), "{line}");
    }
}

#[test]
fn a_container_is_confined_unless_it_is_said_otherwise() {
    let usual = security(&plan("--cap-add cap_net_admin --cap-drop all busybox").unwrap());
    let capabilities = usual.capabilities.unwrap();
    assert_eq!(
        (capabilities.add_capabilities, capabilities.drop_capabilities),
        (vec!["NET_ADMIN".into()], vec!["ALL".to_owned()])
    );
    assert_eq!(usual.seccomp.unwrap().profile_type(), ProfileType::RuntimeDefault);
    assert!(usual.masked_paths.contains(&"/proc/kcore".to_owned()) && usual.readonly_paths.len() == 5);
    let free = plan("--privileged busybox").unwrap();
    assert!(security(&free).privileged && security(&free).seccomp.is_none());
    assert!(free.pod.linux.unwrap().security_context.unwrap().privileged);
    let line = "--read-only --security-opt no-new-privileges --security-opt seccomp=unconfined --security-opt \
                apparmor=mine --security-opt systempaths=unconfined busybox";
    let chosen = security(&plan(line).unwrap());
    assert!(chosen.readonly_rootfs && chosen.no_new_privs && chosen.masked_paths.is_empty());
    assert_eq!(chosen.seccomp.unwrap().profile_type(), ProfileType::Unconfined);
    assert_eq!(chosen.apparmor.unwrap().localhost_ref, "mine");
    assert!(refused("--security-opt label=type:x busybox").contains("SELinux"));
    assert!(refused("--security-opt magic busybox").contains("there are"));
}

#[test]
fn namespaces_are_its_own_or_shared() {
    let options = |line: &str| {
        let plan = plan(line).unwrap();
        let pod = plan.pod.linux.clone().unwrap().security_context.unwrap().namespace_options.unwrap();
        (security(&plan).namespace_options.unwrap(), pod)
    };
    assert_eq!(options("x").0.pid(), NamespaceMode::Container);
    assert_eq!(options("--pid pod x").1.pid(), NamespaceMode::Pod);
    let (container, pod) = options("--pid container:abc --ipc private --pod p x");
    assert_eq!((container.pid(), container.target_id.as_str()), (NamespaceMode::Target, "abc"));
    assert_eq!((pod.pid(), container.ipc()), (NamespaceMode::Container, NamespaceMode::Container));
    assert!(refused("--pid other x").contains("there are"));
    assert!(refused("--userns auto x").contains("numbers of the users"));
}

#[test]
fn files_and_devices_reach_the_container() {
    let line = "-v /srv:/data:ro --mount type=image,src=tools,dst=/tools --device /dev/fuse:/dev/f:rw --device v.com/gpu=0 x";
    let wanted = plan(line).unwrap();
    assert_eq!(wanted.directories, [PathBuf::from("/srv")]);
    assert_eq!((wanted.images.join(""), wanted.container.mounts.len()), ("tools".to_owned(), 2));
    let device = &wanted.container.devices[0];
    assert_eq!((device.container_path.as_str(), device.permissions.as_str()), ("/dev/f", "rw"));
    assert_eq!(wanted.container.cdi_devices[0].name, "v.com/gpu=0");
    assert!(refused("--device fuse x").contains("name of CDI"));
}

#[test]
fn flags_of_a_pod_are_refused_for_a_container_that_joins_one() {
    for flag in
        ["-p 80:80", "--hostname a", "--sysctl a=b", "--handler runc", "--dns 1.1.1.1", "--network host"]
    {
        assert!(refused(&format!("--pod web {flag} busybox")).contains("husk pod create"), "{flag}");
    }
    assert!(plan("--pod web -m 1g -v /srv:/srv busybox").is_ok());
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    for (line, error) in [
        ("--init busybox", "--init is not possible: CRI cannot"),
        ("--restart=always busybox", "--restart is not possible"),
        ("--ulimit nofile=1 busybox", "--ulimit is not possible"),
        ("--no-such busybox", "unknown flag --no-such"),
        ("--platform linux/s390x busybox", "emulates no other"),
        ("--cidfile / busybox", "exists already"),
    ] {
        assert!(refused(line).contains(error), "{line}: {}", refused(line));
    }
}
