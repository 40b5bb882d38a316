#![allow(clippy::indexing_slicing)]

use husk_base::id::ContainerId;
use husk_proto::cri::NamespaceMode;
use husk_volumes::ImageVolume;
use oci_spec::image::Config as ImageConfig;
use oci_spec::runtime::LinuxNamespaceType;

use super::*;
use crate::build;
use crate::host_namespaces::host_network;

fn node_namespaces() -> cri::PodSandboxConfig {
    let node = NamespaceMode::Node as i32;
    let options = cri::NamespaceOption { network: node, pid: node, ipc: node, ..Default::default() };
    let security =
        cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = cri::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() };
    cri::PodSandboxConfig { linux: Some(linux), ..Default::default() }
}

fn built(config: cri::ContainerConfig, sandbox: &cri::PodSandboxConfig) -> Result<Spec, Error> {
    built_with(config, sandbox, &[])
}

fn built_with(
    config: cri::ContainerConfig,
    sandbox: &cri::PodSandboxConfig,
    image_volumes: &[ImageVolume],
) -> Result<Spec, Error> {
    let pod =
        HostPod { directory: "/run/husk/sandboxes/p1".into(), cgroup: "/sys/fs/cgroup/kube/husk-p1".into() };
    let config = cri::ContainerConfig { command: vec!["true".into()], ..config };
    let (id, image) = (ContainerId::from("c1"), ImageConfig::default());
    build(&Input {
        id: &id,
        config: &config,
        sandbox,
        image: &image,
        hooks: &husk_config::Hooks::default(),
        volumes: &[],
        image_volumes,
        target_pid: None,
        apparmor: None,
        host: Some(&pod),
    })
}

fn bind(path: &Path, to: &str) -> cri::Mount {
    cri::Mount { host_path: path.display().to_string(), container_path: to.into(), ..Default::default() }
}

fn source_at(spec: &Spec, destination: &str) -> PathBuf {
    let mounts = spec.mounts().as_ref().unwrap();
    let found = mounts.iter().find(|mount| mount.destination() == Path::new(destination)).unwrap();
    found.source().clone().unwrap()
}

#[test]
fn the_pods_files_and_groups_are_where_its_supervisor_has_them() {
    let spec = built(cri::ContainerConfig::default(), &cri::PodSandboxConfig::default()).unwrap();
    assert_eq!(source_at(&spec, "/etc/hosts"), Path::new("/run/husk/sandboxes/p1/sandbox/hosts"));
    assert_eq!(source_at(&spec, "/dev/shm"), Path::new("/run/husk/sandboxes/p1/sandbox/shm"));
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/kube/husk-p1/c1")));
    let pid = linux.namespaces().iter().flatten().find(|one| one.typ() == LinuxNamespaceType::Pid).unwrap();
    assert_eq!(pid.path().as_deref(), Some(Path::new("/run/husk/sandboxes/p1/sandbox/pidns")));
}

#[test]
fn a_user_namespace_is_the_pods_and_runc_is_told_what_is_in_it() {
    let range = vec![cri::IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
    let users = cri::UserNamespace { mode: NamespaceMode::Pod as i32, uids: range.clone(), gids: range };
    let options = cri::NamespaceOption { userns_options: Some(users), ..Default::default() };
    let security =
        cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = cri::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() };
    let sandbox = cri::PodSandboxConfig { linux: Some(linux), ..Default::default() };
    let spec = built(cri::ContainerConfig::default(), &sandbox).unwrap();
    let linux = spec.linux().as_ref().unwrap();
    let user = linux.namespaces().iter().flatten().find(|one| one.typ() == LinuxNamespaceType::User).unwrap();
    assert_eq!(user.path().as_deref(), Some(Path::new("/run/husk/sandboxes/p1/sandbox/userns")));
    for told in [linux.uid_mappings(), linux.gid_mappings()] {
        let [range] = &told.as_ref().unwrap()[..] else { panic!("{told:?}") };
        assert_eq!((range.container_id(), range.host_id(), range.size()), (0, 100_000, 65_536));
    }
    assert_eq!(source_at(&spec, "/sys"), Path::new("/run/husk/sandboxes/p1/sandbox/sys"));
}

#[test]
fn the_hosts_namespaces_are_had_by_having_none() {
    let sandbox = node_namespaces();
    let spec = built(cri::ContainerConfig::default(), &sandbox).unwrap();
    let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
    assert!(namespaces.iter().all(|one| one.typ() != LinuxNamespaceType::Pid), "{namespaces:?}");
    assert_eq!(source_at(&spec, "/dev/shm"), Path::new("/dev/shm"));
    let node = format!("HOSTNAME={}", nix::unistd::gethostname().unwrap().to_string_lossy());
    assert!(spec.process().as_ref().unwrap().env().as_ref().unwrap().contains(&node), "the node's name");
    assert!(host_network(&sandbox) && host_ipc(&sandbox));
    assert!(!host_network(&cri::PodSandboxConfig::default()));
}

#[test]
fn directories_of_the_host_take_the_place_of_the_pods_files() {
    let folder = tempfile::tempdir().unwrap();
    let mount = |path: &str, to: &str| bind(&folder.path().join(path), to);
    let mounts = vec![mount("deep", "/data/inner"), mount("hosts", "/etc/hosts"), mount("top", "/data")];
    let spec =
        built(cri::ContainerConfig { mounts, ..Default::default() }, &cri::PodSandboxConfig::default())
            .unwrap();
    let places: Vec<_> =
        spec.mounts().iter().flatten().map(|mount| mount.destination().display().to_string()).collect();
    assert_eq!(places.iter().filter(|place| *place == "/etc/hosts").count(), 1);
    let at = |wanted: &str| places.iter().position(|place| place == wanted).unwrap();
    assert!(at("/data") < at("/data/inner"), "{places:?}");
    assert!(source_at(&spec, "/etc/hosts").starts_with(folder.path().canonicalize().unwrap()));
}

#[test]
fn the_pods_files_are_in_a_directory_of_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let mount = |to: &str| bind(folder.path(), to);
    let config = cri::ContainerConfig { mounts: vec![mount("/etc/"), mount("/dev")], ..Default::default() };
    let spec = built(config, &cri::PodSandboxConfig::default()).unwrap();
    let places: Vec<_> = spec.mounts().iter().flatten().map(|mount| mount.destination().clone()).collect();
    let at = |wanted: &str| places.iter().position(|place| place == Path::new(wanted)).unwrap();
    for file in ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"] {
        assert!(at("/etc") < at(file), "{places:?}");
    }
    assert!(at("/dev") < at("/dev/shm") && !places.contains(&"/dev/pts".into()), "{places:?}");
}

#[test]
fn images_are_mounted_before_what_is_below_them() {
    let folder = tempfile::tempdir().unwrap();
    let host = |to: &str| bind(folder.path(), to);
    let image = cri::Mount {
        container_path: "/data/models".into(),
        image: Some(cri::ImageSpec { image: "models:1".into(), ..Default::default() }),
        ..Default::default()
    };
    let mounts = vec![host("/data/models/cache"), image, host("/data")];
    let images =
        husk_volumes::image::wanted(&mounts, |_| Ok::<_, husk_volumes::image::Error>("/files/models".into()))
            .unwrap();
    let config = cri::ContainerConfig { mounts, ..Default::default() };
    let spec = built_with(config, &cri::PodSandboxConfig::default(), &images).unwrap();
    let places = spec.mounts().iter().flatten().map(|mount| mount.destination().as_path());
    let data: Vec<_> = places.filter(|place| place.starts_with("/data")).collect();
    assert_eq!(data, ["/data", "/data/models", "/data/models/cache"].map(Path::new));
    let image = spec.mounts().iter().flatten().find(|it| *it.destination() == *Path::new("/data/models"));
    let options = image.unwrap().options().clone().unwrap();
    for option in ["ro", "noexec", "nosuid", "nodev"] {
        assert!(options.iter().any(|it| it == option), "{options:?}");
    }
}

#[test]
fn mounts_that_cannot_be_are_refused_by_their_path() {
    let of = |mount: cri::Mount| {
        let config = cri::ContainerConfig { mounts: vec![mount], ..Default::default() };
        built(config, &cri::PodSandboxConfig::default()).unwrap_err().to_string()
    };
    let mount = cri::Mount { host_path: "tmp".into(), container_path: "/x".into(), ..Default::default() };
    assert!(of(mount.clone()).contains("mount of tmp"));
    let climbing =
        cri::Mount { host_path: "/tmp".into(), container_path: "/x/../..".into(), ..mount.clone() };
    assert!(of(climbing).contains("container_path"));
    let recursive = cri::Mount { host_path: "/tmp".into(), recursive_read_only: true, ..mount };
    assert!(of(recursive).contains("recursive_read_only"));
}
