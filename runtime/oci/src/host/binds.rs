//! Directories and files of the host in a container, with the propagation that
//! the client asks for (CRI `Mount`; Linux `Documentation/filesystems/sharedsubtree.rst`).

use std::fs;
use std::path::{Path, PathBuf};

use husk_base::mountinfo;
use husk_proto::cri::{self, MountPropagation};
use husk_volumes as volumes;
use husk_volumes::{ImageVolume, is_image};
use oci_spec::runtime::{Mount, MountBuilder};

use super::Error;
use crate::mounts::{is_own_directory, merge};

/// Adds the client's mounts to those that every container has, in place of those at the
/// same destination. Mounts of images, and directories that the container's own
/// image declares, are there already. Answers the propagation that the root
/// file system needs.
pub(super) fn add(
    mounts: &mut Vec<Mount>,
    asked: &[cri::Mount],
    images: &[ImageVolume],
) -> Result<Option<String>, Error> {
    let table = if asked.iter().any(|mount| mount.propagation != 0) {
        fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()
    } else {
        String::new()
    };
    let mut root = None;
    let mut binds = Vec::with_capacity(asked.len());
    for mount in asked.iter().filter(|mount| !is_image(mount)) {
        let (bind, propagation) = bind(mount, &table)?;
        // The root must be shared if one of the mounts is.
        match propagation {
            "rshared" => root = Some(propagation),
            "rslave" => root = root.or(Some(propagation)),
            _ => {}
        }
        binds.push(bind);
    }
    mounts.retain(|mount| binds.iter().all(|bind| bind.destination() != mount.destination()));
    binds.extend(mounts.extract_if(.., |mount| {
        is_own_directory(mount) || images.iter().any(|image| image.container_path == *mount.destination())
    }));
    *mounts = merge(std::mem::take(mounts), binds);
    Ok(root.map(str::to_owned))
}

fn bind(mount: &cri::Mount, table: &str) -> Result<(Mount, &'static str), Error> {
    let invalid = |reason: String| Error::Invalid(format!("mount of {}: {reason}", mount.host_path));
    let source = source(Path::new(&mount.host_path)).map_err(invalid)?;
    let destination = Path::new("/").join(&mount.container_path);
    if mount.container_path.is_empty() || destination.components().any(|part| part.as_os_str() == "..") {
        return Err(invalid(format!(
            "container_path `{}` is no path inside of the container",
            mount.container_path
        )));
    }
    let propagation = match MountPropagation::try_from(mount.propagation) {
        Ok(MountPropagation::PropagationPrivate) => "rprivate",
        Ok(MountPropagation::PropagationHostToContainer) => "rslave",
        Ok(MountPropagation::PropagationBidirectional) => "rshared",
        Err(_) => return Err(invalid(format!("unknown propagation {}", mount.propagation))),
    };
    check_propagation(&source, propagation, table).map_err(invalid)?;
    let access = match (mount.readonly, mount.recursive_read_only) {
        (false, false) => "rw",
        (true, false) => "ro",
        (true, true) if propagation == "rprivate" => "rro",
        _ => return Err(invalid("recursive_read_only needs readonly, and no propagation".into())),
    };
    let more = volumes::options(&mount.mount_options).map_err(invalid)?;
    let bind = MountBuilder::default()
        .destination(destination)
        .typ("bind")
        .source(source)
        .options([["rbind", propagation, access].map(str::to_owned).to_vec(), more].concat())
        .build()?;
    Ok((bind, propagation))
}

/// The path without links. A directory that does not exist is made, as the
/// kubelet expects of a runtime.
fn source(path: &Path) -> Result<PathBuf, String> {
    if !path.is_absolute() {
        return Err("host_path must be absolute".into());
    }
    if let Err(error) = fs::symlink_metadata(path) {
        if error.kind() != std::io::ErrorKind::NotFound {
            return Err(error.to_string());
        }
        fs::create_dir_all(path).map_err(|error| format!("it does not exist and cannot be made: {error}"))?;
    }
    path.canonicalize().map_err(|error| error.to_string())
}

/// Checks that the source's mount can propagate as `wanted`: mounts get out of a container only
/// through a shared mount, and into it only from one that is shared or a slave.
fn check_propagation(source: &Path, wanted: &str, table: &str) -> Result<(), String> {
    let (kinds, word): (&[&str], _) = match wanted {
        "rshared" => (&["shared:"], "a shared mount"),
        "rslave" => (&["shared:", "master:"], "a shared mount or a slave of one"),
        _ => return Ok(()),
    };
    let Some((place, tags)) = mount_of(source, table) else {
        return Err("the mount that it is on is not in /proc/self/mountinfo".into());
    };
    if tags.iter().any(|tag| kinds.iter().any(|kind| tag.starts_with(kind))) {
        return Ok(());
    }
    let place = place.display();
    Err(format!("its propagation needs {place} to be {word}: `mount --make-rshared {place}` makes it one"))
}

/// The mount that a path is on: its place and its optional fields
/// (proc_pid_mountinfo(5)).
fn mount_of<'a>(path: &Path, table: &'a str) -> Option<(PathBuf, Vec<&'a str>)> {
    let mounts = table.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(4);
        let place = mountinfo::unescape(fields.next()?.as_bytes());
        let tags = fields.skip(1).take_while(|field| *field != "-").collect();
        path.starts_with(&place).then_some((place, tags))
    });
    // The last one of mounts on top of each other counts.
    mounts.max_by_key(|(place, _)| place.components().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
        22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        30 22 0:25 / /srv/my\\040data rw master:7 - tmpfs tmpfs rw\n\
        31 22 0:26 / /private rw - tmpfs tmpfs rw\n\
        32 31 0:27 / /private rw shared:9 - tmpfs tmpfs rw\n\
        33 22 0:28 / /alone rw - tmpfs tmpfs rw\n";

    #[test]
    fn the_mount_that_a_path_is_on_decides() {
        let check = |path: &str, wanted| check_propagation(Path::new(path), wanted, TABLE);
        assert!(check("/home/x", "rshared").is_ok());
        assert!(check("/srv/my data/x", "rslave").is_ok());
        let refused = check("/srv/my data/x", "rshared").unwrap_err();
        assert!(refused.contains("mount --make-rshared /srv/my data"), "{refused}");
        assert!(check("/private/x", "rshared").is_ok(), "the upper one counts");
        assert!(check("/privateer", "rshared").is_ok(), "that is on /");
        assert!(check("/alone", "rslave").unwrap_err().contains("/alone"));
        assert!(check("/alone", "rprivate").is_ok());
    }

    #[test]
    fn a_directory_that_is_missing_is_made_and_a_link_followed() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("a/b");
        let made = source(&missing).unwrap();
        assert!(made.is_dir());
        std::os::unix::fs::symlink(&missing, folder.path().join("link")).unwrap();
        assert_eq!(source(&folder.path().join("link")).unwrap(), made);
        assert!(source(Path::new("relative")).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_table_is_survived(table in "(?s).{0,200}", path in "/[a-z/]{0,20}") {
            let _ = mount_of(Path::new(&path), &table);
        }
    }
}
