//! The OCI configuration: huskd writes it, and the agent adds the parts that
//! only the guest knows.

use std::path::{Path, PathBuf};

use husk_proto::agent::{OWN_DIRECTORY, User};
use oci_spec::runtime::{Process, Spec};

use crate::container::user::Identity;
use crate::guest::cgroup::Cgroup;

/// Most bytes of a configuration.
const MAX_JSON: usize = 4 * 1024 * 1024;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The JSON is not an OCI configuration.
    #[error("not an OCI configuration: {0}")]
    Json(#[from] serde_json::Error),
    /// The JSON is far larger than any configuration.
    #[error("the OCI configuration has {0} bytes; at most {MAX_JSON} are read")]
    TooLarge(usize),
    /// The configuration lacks a required part.
    #[error("the OCI configuration has no {0}")]
    Missing(&'static str),
    /// `linux.cgroupsPath` is not usable with runc's cgroupfs driver.
    #[error("cgroupsPath {0:?} must be absolute, without `..` and without `:`")]
    CgroupsPath(String),
}

/// Reads a configuration.
pub fn parse(json: &[u8]) -> Result<Spec, Error> {
    if json.len() > MAX_JSON {
        return Err(Error::TooLarge(json.len()));
    }
    let spec: Spec = serde_json::from_slice(json)?;
    let process = spec.process().as_ref().ok_or(Error::Missing("process"))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::Missing("process.args"));
    }
    if spec.linux().is_none() {
        return Err(Error::Missing("linux"));
    }
    Ok(spec)
}

/// The container's cgroup: the one that the configuration names, or else
/// `/pod/<id>`, which is then added to the configuration.
pub fn choose_cgroup(spec: &mut Spec, id: &str) -> Result<Cgroup, Error> {
    let linux = spec.linux_mut().as_mut().ok_or(Error::Missing("linux"))?;
    let path = match linux.cgroups_path() {
        Some(path) if !path.as_os_str().is_empty() => path.to_string_lossy().into_owned(),
        _ => format!("/pod/{id}"),
    };
    let cgroup = Cgroup::from_oci_path(&path).ok_or_else(|| Error::CgroupsPath(path.clone()))?;
    linux.set_cgroups_path(Some(path.into()));
    Ok(cgroup)
}

/// Adds the root filesystem, the user and the terminal.
pub fn complete(
    spec: &mut Spec,
    rootfs: &Path,
    identity: &Identity,
    request: &User,
    terminal: bool,
) -> Result<(), Error> {
    let mut root = spec.root().clone().unwrap_or_default();
    root.set_path(rootfs.to_owned());
    spec.set_root(Some(root));

    let process = spec.process_mut().as_mut().ok_or(Error::Missing("process"))?;
    process.set_terminal(Some(terminal));
    let user = process.user_mut();
    let mut groups = identity.groups.clone();
    groups.extend(user.additional_gids().iter().flatten());
    groups.extend(&request.additional_gids);
    user.set_uid(identity.uid);
    user.set_gid(identity.gid);
    user.set_username(None);
    user.set_additional_gids(Some(groups.into_iter().collect()));

    let environment = process.env_mut().get_or_insert_default();
    if !environment.iter().any(|variable| variable.starts_with("HOME=")) {
        environment.push(format!("HOME={}", identity.home));
    }
    if terminal {
        name_terminal(environment);
    }
    // Otherwise runc's child would inherit the agent's value.
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(Some(0));
    }
    Ok(())
}

/// The paths of the container's own directories.
pub fn own_directories(spec: &Spec) -> Vec<PathBuf> {
    let mounts = spec.mounts().iter().flatten();
    let own = mounts.filter(|mount| mount.source().as_deref() == Some(Path::new(OWN_DIRECTORY)));
    own.map(|mount| mount.destination().clone()).collect()
}

/// Sets the sources of mounts of image volumes and of the container's own
/// directories, by destination.
pub fn place_volumes(spec: &mut Spec, volumes: &[(PathBuf, PathBuf)]) -> Result<(), Error> {
    for (destination, source) in volumes {
        let mounts = spec.mounts_mut().iter_mut().flatten();
        let mount = { mounts }.find(|mount| mount.destination() == destination);
        mount.ok_or(Error::Missing("mount for a volume"))?.set_source(Some(source.clone()));
    }
    Ok(())
}

/// Whether the container is to join the namespace at `path`.
pub fn joins(spec: &Spec, path: &Path) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| namespace.path().as_deref() == Some(path))
}

/// The user and groups of a completed configuration.
pub fn identity(spec: &Spec) -> husk_proto::agent::Identity {
    let user = spec.process().as_ref().map(|process| process.user().clone()).unwrap_or_default();
    let groups = user.additional_gids().clone().unwrap_or_default();
    husk_proto::agent::Identity { uid: user.uid(), gid: user.gid(), groups }
}

/// Sets `TERM` for a process with a terminal, unless it is set.
fn name_terminal(environment: &mut Vec<String>) {
    if !environment.iter().any(|variable| variable.starts_with("TERM=")) {
        environment.push("TERM=xterm".into());
    }
}

/// The process of an exec: other arguments, with the user, environment,
/// directory and capabilities of the container, and with or without a terminal.
pub fn exec_process(spec: &Spec, args: Vec<String>, terminal: bool) -> Result<Process, Error> {
    let mut process = spec.process().clone().ok_or(Error::Missing("process"))?;
    process.set_args(Some(args));
    process.set_terminal(Some(terminal));
    process.set_console_size(None);
    if terminal {
        name_terminal(process.env_mut().get_or_insert_default());
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use super::*;

    const JSON: &str = r#"{
        "ociVersion": "1.0.2",
        "process": {
            "args": ["nginx"], "cwd": "/srv", "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0, "additionalGids": [7]}
        },
        "root": {"path": "x", "readonly": true},
        "linux": {"cgroupsPath": "/pod/c1"}
    }"#;

    fn identity() -> Identity {
        Identity { uid: 33, gid: 34, groups: BTreeSet::from([34, 8]), home: "/var/www".into() }
    }

    fn completed(request: &User) -> Spec {
        let mut spec = parse(JSON.as_bytes()).unwrap();
        complete(&mut spec, Path::new("/run/rootfs"), &identity(), request, false).unwrap();
        spec
    }

    #[test]
    fn the_guests_part_is_filled_in_and_the_rest_is_kept() {
        let request = User { additional_gids: vec![5, 8], ..User::default() };
        let spec = completed(&request);
        let root = spec.root().as_ref().unwrap();
        assert_eq!((root.path(), root.readonly()), (&PathBuf::from("/run/rootfs"), Some(true)));
        let process = spec.process().as_ref().unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (33, 34));
        assert_eq!(process.user().additional_gids().as_ref().unwrap(), &[5, 7, 8, 34]);
        assert_eq!(process.env().as_ref().unwrap(), &["PATH=/bin", "HOME=/var/www"]);
        assert_eq!(process.cwd(), Path::new("/srv"));
        assert_eq!(process.oom_score_adj(), Some(0));
    }

    #[test]
    fn a_containers_own_directories_get_the_sources_that_were_made() {
        let json = r#"{"ociVersion":"1.0.2","mounts":[{"destination":"/data","type":"bind","source":"own-directory"},
            {"destination":"/etc/hosts","type":"bind","source":"/run/hosts"}]}"#;
        let mut spec: Spec = serde_json::from_str(json).unwrap();
        assert_eq!(own_directories(&spec), [Path::new("/data")]);
        place_volumes(&mut spec, &[("/data".into(), "/made".into())]).unwrap();
        let sources = spec.mounts().iter().flatten().map(|mount| mount.source().clone().unwrap());
        assert_eq!(sources.collect::<Vec<_>>(), ["/made", "/run/hosts"].map(PathBuf::from));
        assert!(own_directories(&spec).is_empty());
        assert!(place_volumes(&mut spec, &[("/none".into(), "/made".into())]).is_err());
    }

    #[test]
    fn a_home_that_is_set_stays() {
        let mut spec = parse(JSON.as_bytes()).unwrap();
        spec.process_mut().as_mut().unwrap().set_env(Some(vec!["HOME=/data".into()]));
        complete(&mut spec, Path::new("/r"), &identity(), &User::default(), false).unwrap();
        assert_eq!(spec.process().as_ref().unwrap().env().as_ref().unwrap(), &["HOME=/data"]);
    }

    #[test]
    fn a_terminal_has_the_kind_that_is_said_or_else_a_usual_one() {
        for (said, kind) in [("A=b", "TERM=xterm"), ("TERM=vt100", "TERM=vt100")] {
            let mut spec = parse(JSON.as_bytes()).unwrap();
            spec.process_mut().as_mut().unwrap().set_env(Some(vec![said.into()]));
            complete(&mut spec, Path::new("/r"), &identity(), &User::default(), true).unwrap();
            let env = spec.process().as_ref().unwrap().env().clone().unwrap();
            let kinds: Vec<_> = env.iter().filter(|variable| variable.starts_with("TERM=")).collect();
            assert_eq!(kinds, [kind]);
        }
    }

    #[test]
    fn an_exec_differs_from_its_container_in_arguments_and_terminal_only() {
        let spec = completed(&User::default());
        let exec = exec_process(&spec, vec!["sh".into()], true).unwrap();
        assert_eq!(exec.args().as_ref().unwrap(), &["sh"]);
        assert_eq!(exec.terminal(), Some(true));
        let init = spec.process().as_ref().unwrap();
        assert_eq!((exec.user(), exec.cwd()), (init.user(), init.cwd()));
        assert_eq!(exec.env().as_ref().unwrap(), &["PATH=/bin", "HOME=/var/www", "TERM=xterm"]);
        let plain = exec_process(&spec, vec!["sh".into()], false).unwrap();
        assert_eq!(plain.env(), init.env());
    }

    #[test]
    fn configurations_that_cannot_run_are_refused() {
        for json in ["", "[]", "{}", r#"{"ociVersion":"1.0.2","process":{"args":["x"],"cwd":"/","user":{}}}"#]
        {
            assert!(parse(json.as_bytes()).is_err(), "{json}");
        }
        assert!(matches!(parse(&vec![b' '; MAX_JSON + 1]), Err(Error::TooLarge(_))));
        let without_args = JSON.replace(r#"["nginx"]"#, "[]");
        assert!(matches!(parse(without_args.as_bytes()), Err(Error::Missing("process.args"))));
    }

    #[test]
    fn the_cgroup_is_the_configurations_or_one_by_id() {
        let mut spec = parse(JSON.as_bytes()).unwrap();
        assert!(choose_cgroup(&mut spec, "c1").is_ok());
        let linux = spec.linux_mut().as_mut().unwrap();
        linux.set_cgroups_path(None);
        choose_cgroup(&mut spec, "c2").unwrap();
        let chosen = spec.linux().as_ref().unwrap().cgroups_path().clone();
        assert_eq!(chosen, Some(PathBuf::from("/pod/c2")));
        spec.linux_mut().as_mut().unwrap().set_cgroups_path(Some("/../x".into()));
        assert!(matches!(choose_cgroup(&mut spec, "c3"), Err(Error::CgroupsPath(_))));
    }
}
