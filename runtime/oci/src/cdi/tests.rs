use std::fs;

use super::*;

const FUSE: &str = r#"{
    "cdiVersion": "0.6.0", "kind": "husk.test/node", "annotations": {"a": "b"},
    "containerEdits": {"env": ["ALL=yes"]},
    "devices": [
        {"name": "fuse", "containerEdits": {
            "env": ["ONE=1=2", "PATH=/new"],
            "deviceNodes": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 432,
                             "permissions": "rw", "uid": 7, "gid": 8}],
            "mounts": [{"hostPath": "/lib/x", "containerPath": "/x", "options": ["ro", "nosuid", "bind"]}],
            "additionalGids": [44]
        }},
        {"name": "hooked", "containerEdits": {
            "hooks": [{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook", "x"], "timeout": 5}]
        }}
    ]
}"#;

const TUN: &str = "
cdiVersion: 0.5.0
kind: husk.test/net
devices:
  - name: tun
    containerEdits:
      deviceNodes:
        - path: /dev/tun
          hostPath: /dev/net/tun
";

/// Directories with a file each, for as long as the first is held.
fn dirs(files: &[(&str, &str)]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let parent = tempfile::tempdir().unwrap();
    let mut dirs = Vec::new();
    for (path, text) in files {
        let path = parent.path().join(path);
        let dir = path.parent().unwrap().to_owned();
        fs::create_dir_all(&dir).unwrap();
        fs::write(path, text).unwrap();
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    (parent, dirs)
}

fn asking(names: &[&str]) -> cri::ContainerConfig {
    let cdi_devices = names.iter().map(|name| cri::CdiDevice { name: (*name).into() }).collect();
    let path = cri::KeyValue { key: "PATH".into(), value: "/old".into() };
    cri::ContainerConfig { cdi_devices, envs: vec![path], ..Default::default() }
}

fn refused(files: &[(&str, &str)], name: &str) -> String {
    let (_parent, dirs) = dirs(files);
    apply(&mut asking(&[name]), &dirs, None).unwrap_err().to_string()
}

#[test]
fn what_a_device_needs_takes_the_place_of_its_name() {
    let (_parent, dirs) = dirs(&[("a/fuse.json", FUSE), ("b/tun.yaml", TUN), ("b/readme.txt", "nothing")]);
    let mut config = asking(&["husk.test/node=fuse", "husk.test/node=hooked"]);
    config.annotations.insert("cdi.k8s.io/x".into(), "husk.test/net=tun, husk.test/node=fuse".into());
    let mut hooks = config::Hooks::default();
    apply(&mut config, &dirs, Some(&mut hooks)).unwrap();
    let device = |host: &str, container: &str, permissions: &str| cri::Device {
        host_path: host.into(),
        container_path: container.into(),
        permissions: permissions.into(),
    };
    assert_eq!(
        config.devices,
        [device("/dev/fuse", "/dev/fuse", "rw"), device("/dev/net/tun", "/dev/tun", "rwm")]
    );
    let envs: Vec<_> = config.envs.iter().map(|env| (env.key.as_str(), env.value.as_slice())).collect();
    assert_eq!(envs, [("ALL", &b"yes"[..]), ("ONE", b"1=2"), ("PATH", b"/new")]);
    let [mount] = &config.mounts[..] else { panic!("{:?}", config.mounts) };
    assert_eq!(
        (mount.host_path.as_str(), mount.container_path.as_str(), mount.readonly),
        ("/lib/x", "/x", true)
    );
    assert_eq!(mount.mount_options, ["nosuid"]);
    assert_eq!(config.linux.unwrap().security_context.unwrap().supplemental_groups, [44]);
    assert!(config.cdi_devices.is_empty());
    let [hook] = &hooks.create_container[..] else { panic!("{hooks:?}") };
    assert_eq!((hook.path.as_path(), hook.timeout_seconds), (Path::new("/bin/hook"), Some(5)));
}

#[test]
fn nothing_asked_for_changes_nothing() {
    let mut config = asking(&[]);
    apply(&mut config, &["/no/such/directory".into()], None).unwrap();
    assert_eq!(config, asking(&[]));
}

#[test]
fn a_later_directory_counts_more() {
    let other = FUSE.replace("ALL=yes", "ALL=no");
    let (_parent, dirs) = dirs(&[("a/one.json", FUSE), ("b/two.json", &other)]);
    let mut config = asking(&["husk.test/node=fuse"]);
    apply(&mut config, &dirs, None).unwrap();
    assert!(config.envs.iter().any(|env| env.key == "ALL" && env.value == b"no"));
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let twice = refused(&[("a/one.json", FUSE), ("a/two.json", FUSE)], "husk.test/node=fuse");
    assert!(twice.contains("one.json and") && twice.contains("both have it"), "{twice}");
    let hook = refused(&[("a/one.json", FUSE)], "husk.test/node=hooked");
    assert!(hook.contains("/bin/hook") && hook.contains("runtime handler"), "{hook}");
    let missing = refused(&[("a/one.json", FUSE), ("a/bad.json", "{")], "husk.test/node=other");
    assert!(missing.contains("no CDI file has it") && missing.contains("bad.json"), "{missing}");
    assert!(refused(&[("a/one.json", FUSE)], "fuse").contains("vendor.com/class=device"));
    for (this, that, word) in [
        ("additionalGids", "intelRdt", "intelRdt"),
        ("0.6.0", "9.9.9", "9.9.9"),
        ("ONE=1=2", "ONE", "NAME=value"),
        (r#""options""#, r#""type": "tmpfs", "options""#, "tmpfs"),
    ] {
        let said = refused(&[("a/one.json", &FUSE.replace(this, that))], "husk.test/node=fuse");
        assert!(said.contains(word), "{said}");
    }
}
