use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::*;
use crate::shared_dir::SharedDir;

fn mount(host: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        ..Default::default()
    }
}

fn prepared(mounts: &[cri::Mount], in_use: &[Volume]) -> Result<Vec<Volume>, String> {
    let prepared = prepare(mounts, in_use, &[]).map_err(|error| error.to_string())?;
    Ok(prepared.into_iter().map(|one| one.volume).collect())
}

#[test]
fn the_same_directory_in_two_places_is_one_mount() {
    let folder = tempfile::tempdir().unwrap();
    let (data, other) = (folder.path().join("data"), folder.path().join("other"));
    std::fs::create_dir_all(&data).unwrap();
    std::fs::create_dir_all(&other).unwrap();
    symlink(&data, folder.path().join("link")).unwrap();
    let read_only = cri::Mount { readonly: true, ..mount(&data, "/ro") };
    let wanted =
        [mount(&data, "/a"), mount(&folder.path().join("link"), "/b"), mount(&other, "/c"), read_only];
    let volumes = prepared(&wanted, &[]).unwrap();
    let names: Vec<_> = volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["v0", "v0", "v1", "v2"]);
    let next = prepared(&[mount(&other, "/x"), mount(folder.path(), "/y")], &volumes).unwrap();
    assert_eq!((next[0].name.as_str(), next[1].name.as_str()), ("v1", "v3"));
}

#[test]
fn a_volume_tells_by_its_name_that_it_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let (inside, outside) = (folder.path().join("pods/data"), folder.path().join("pods-of-others"));
    std::fs::create_dir_all(&inside).unwrap();
    std::fs::create_dir_all(&outside).unwrap();
    // A link is as trusted as the place that it leads to.
    symlink(&outside, folder.path().join("pods/link")).unwrap();
    let wanted = [&inside, &outside, &folder.path().join("pods/link")].map(|path| mount(path, "/data"));
    let trusted = [folder.path().canonicalize().unwrap().join("pods")];
    let prepared = prepare(&wanted, &[], &trusted).unwrap();
    let names: Vec<_> = prepared.iter().map(|one| one.volume.name.as_str()).collect();
    assert_eq!(names, ["t0", "v0", "v0"]);
    assert!(names[0].starts_with(TRUSTED) && !names[1].starts_with(TRUSTED));
}

#[test]
fn a_directory_that_is_put_in_anothers_place_is_another() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let before = prepared(&[mount(&data, "/a")], &[]).unwrap();
    std::fs::rename(&data, folder.path().join("old")).unwrap();
    let after = prepared(&[mount(&data, "/a")], &before).unwrap();
    assert!(data.is_dir(), "it was made anew");
    assert_ne!(before[0].name, after[0].name);
}

#[test]
fn what_cannot_be_mounted_is_refused_and_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let _listener = UnixListener::bind(path.join("socket")).unwrap();
    let plain = mount(path, "/data");
    let propagation = cri::MountPropagation::PropagationBidirectional as i32;
    for (wanted, word) in [
        (mount(path, "data"), "absolute"),
        (mount(Path::new("data"), "/data"), "host_path"),
        (mount(Path::new(""), "/data"), "host_path"),
        (mount(&path.join("socket"), "/run/docker.sock"), "is a socket"),
        (mount(Path::new("/dev/null"), "/x"), "is a device"),
        (cri::Mount { propagation, ..plain.clone() }, "HostToContainer"),
        (cri::Mount { propagation: 9, ..plain.clone() }, "propagation 9"),
        (cri::Mount { recursive_read_only: true, ..plain.clone() }, "readonly"),
        (cri::Mount { mount_options: vec!["size=1m".into()], ..plain.clone() }, "size=1m"),
    ] {
        let error = prepared(&[wanted], &[]).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn paths_in_containers_lose_their_dots() {
    assert_eq!(clean("/a/./b/../c/").unwrap(), Path::new("/a/c"));
    assert_eq!(clean("/../..").unwrap(), Path::new("/"));
    assert!(clean("a/b").is_none() && clean("").is_none());
}

#[test]
fn a_mount_point_with_something_in_it_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let shared = SharedDir::at(folder.path().join("shared"));
    shared.close().unwrap();
    std::fs::create_dir_all(shared.path().join("v0/precious")).unwrap();
    std::fs::write(shared.path().join("v1"), "precious").unwrap();
    assert!(shared.release(None, "v0").is_err());
    assert!(shared.release(None, "v1").unwrap_err().to_string().contains("not empty"));
    assert!(shared.close().is_err());
    assert!(shared.path().join("v0/precious").is_dir());
}
