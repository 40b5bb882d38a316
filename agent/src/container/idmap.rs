//! Volumes whose files belong to the pod's users: CRI's `uidMappings` and
//! `gidMappings`, which are also in the OCI configuration.
//!
//! runc before 1.2 does not know them. So the agent makes the ID-mapped mount
//! (mount_setattr(2)) in a directory for the container, and the configuration
//! for runc has a plain bind mount of that. huskd has checked that the mappings
//! are those of the pod's user namespace.
//!
//! Behind these mounts are files of the host. So they are not in the bundle,
//! which is removed with all its content, and only empty directories are
//! removed here.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use husk_proto::agent::paths;
use nix::errno::Errno;
use nix::mount::MsFlags;
use oci_spec::runtime::{Mount, Spec};

use crate::guest::mode::Mode;
use crate::guest::mounts;
use crate::pod::userns;

const MAPPED: &str = "/run/husk/mapped";

/// A volume cannot be mounted with other ids.
#[derive(Debug, thiserror::Error)]
#[error("volume at {destination}: its ids cannot be mapped: {problem}")]
pub struct Error {
    destination: String,
    problem: Problem,
}

/// The cause of an [`Error`].
#[derive(Debug, thiserror::Error)]
enum Problem {
    /// The kernel does not support ID-mapped mounts of this file system.
    #[error(
        "{source_path} is on {filesystem}, of which this kernel has no ID-mapped mounts; put the volume on a file \
         system that has them, such as ext4 or XFS, or run the pod without a user namespace"
    )]
    FileSystem { source_path: PathBuf, filesystem: String },
    /// The kernel refused a step.
    #[error("{doing} {path}: {cause}")]
    Kernel { doing: &'static str, path: PathBuf, cause: io::Error },
}

/// A bind mount that is to be ID-mapped.
#[derive(Debug, PartialEq, Eq)]
struct MappedBind {
    source: PathBuf,
    destination: PathBuf,
    /// `MS_SLAVE` or `MS_PRIVATE`; `None` when the container shares its mounts
    /// with the host.
    propagation: Option<MsFlags>,
}

/// The ID-mapped volumes of a container.
pub struct Mapped {
    folder: PathBuf,
    /// The pod's user namespace, pinned as a file.
    namespace: PathBuf,
    count: usize,
}

impl Mapped {
    /// No volumes yet, for container `id`.
    pub fn of(id: &str, mode: &Mode) -> Self {
        Self { folder: mode.at(MAPPED).join(id), namespace: mode.at(paths::USER_NAMESPACE), count: 0 }
    }

    /// Mounts the binds of a configuration that are to be ID-mapped, and
    /// changes the configuration to use these mounts.
    pub async fn map(&mut self, spec: &mut Spec) -> Result<(), Error> {
        let all = take(spec, &self.folder);
        self.count = all.len();
        let (folder, namespace) = (self.folder.clone(), self.namespace.clone());
        // A system call may wait for the host, which must not hold up the
        // agent.
        let mapped = tokio::task::spawn_blocking(move || {
            all.iter().enumerate().try_for_each(|(number, wanted)| {
                mount(wanted, &point(&folder, number), &namespace).map_err(|problem| Error {
                    destination: wanted.destination.display().to_string(),
                    problem,
                })
            })
        });
        mapped.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    /// Unmounts the volumes. Can be repeated after a failure.
    pub fn remove(&self) -> io::Result<()> {
        for number in 0..self.count {
            unmount(&point(&self.folder, number))?;
        }
        unless_missing(fs::remove_dir(&self.folder))
    }

    /// The directory of the mount points.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

fn point(folder: &Path, number: usize) -> PathBuf {
    folder.join(number.to_string())
}

fn unless_missing(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// Removes the mappings from a configuration, and changes the sources of the
/// binds that had them to mount points in `folder`.
fn take(spec: &mut Spec, folder: &Path) -> Vec<MappedBind> {
    let mut all = Vec::new();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let mapped = [mount.uid_mappings(), mount.gid_mappings()]
            .into_iter()
            .any(|ranges| ranges.as_ref().is_some_and(|ranges| !ranges.is_empty()));
        mount.set_uid_mappings(None);
        mount.set_gid_mappings(None);
        let Some(source) = mount.source().clone().filter(|_| mapped) else { continue };
        mount.set_source(Some(point(folder, all.len())));
        let destination = mount.destination().clone();
        all.push(MappedBind { source, destination, propagation: propagation(mount) });
    }
    all
}

fn propagation(mount: &Mount) -> Option<MsFlags> {
    let has = |wanted: &str| mount.options().iter().flatten().any(|option| option == wanted);
    if has("rshared") {
        None
    } else if has("rslave") {
        Some(MsFlags::MS_SLAVE)
    } else {
        Some(MsFlags::MS_PRIVATE)
    }
}

fn mount(wanted: &MappedBind, point: &Path, namespace: &Path) -> Result<(), Problem> {
    let MappedBind { source, propagation, .. } = wanted;
    let failed = |doing, path: &Path| {
        let path = path.to_owned();
        move |cause| Problem::Kernel { doing, path, cause }
    };
    if let Some(folder) = point.parent() {
        fs::create_dir_all(folder).map_err(failed("make directory", folder))?;
    }
    let directory = fs::metadata(source).map_err(failed("look at", source))?.is_dir();
    let made = if directory { fs::create_dir(point) } else { fs::File::create_new(point).map(drop) };
    made.map_err(failed("make mount point", point))?;
    let tree = userns::open_tree(source, libc::AT_RECURSIVE).map_err(failed("copy the mount of", source))?;
    userns::map(&tree, namespace).map_err(|cause| match cause.raw_os_error() {
        Some(libc::EINVAL) => {
            Problem::FileSystem { source_path: source.clone(), filesystem: filesystem_of(source) }
        }
        _ => failed("map the ids of", source)(cause),
    })?;
    if let Some(propagation) = propagation {
        userns::propagate(&tree, propagation.bits()).map_err(failed("set up the mount of", source))?;
    }
    userns::attach(&tree, point).map_err(failed("mount", point))
}

/// Unmounts a volume, with the host's mounts below it. These are made private
/// first, so that they stay mounted on the host.
fn unmount(point: &Path) -> io::Result<()> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    match nix::mount::mount(None::<&str>, point, None::<&str>, private, None::<&str>) {
        Ok(()) => mounts::detach(point),
        // Nothing is mounted there.
        Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    remove_mount_point(point)
}

/// Removes an empty directory or file, and nothing else.
fn remove_mount_point(point: &Path) -> io::Result<()> {
    match fs::symlink_metadata(point) {
        Ok(found) if found.is_dir() => unless_missing(fs::remove_dir(point)),
        Ok(found) if found.len() == 0 => unless_missing(fs::remove_file(point)),
        Ok(_) => Err(io::Error::other("it is not empty, so it is no mount point")),
        Err(error) => unless_missing(Err(error)),
    }
}

/// The type of the file system that a file is on.
fn filesystem_of(path: &Path) -> String {
    let found = fs::File::open(path).and_then(|file| {
        let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        let id = about.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim);
        Ok(id.and_then(|id| filesystem_in(&table, id)))
    });
    found.ok().flatten().unwrap_or_else(|| "a file system".to_owned())
}

/// The type of a mount's file system in a table of mounts
/// (proc_pid_mountinfo(5)).
fn filesystem_in(table: &str, id: &str) -> Option<String> {
    let line = table.lines().find(|line| line.split(' ').next() == Some(id))?;
    let (_, device) = line.split_once(" - ")?;
    device.split(' ').next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        let map = r#"[{"containerID":0,"hostID":1000,"size":65536}]"#;
        let json = format!(
            r#"{{"ociVersion":"1.0.2","mounts":[
                {{"destination":"/proc","type":"proc","source":"proc"}},
                {{"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","rprivate"],
                  "uidMappings":{map},"gidMappings":{map}}},
                {{"destination":"/plain","type":"bind","source":"/srv/plain","options":["rbind"]}},
                {{"destination":"/follows","type":"bind","source":"/srv/follows","options":["rbind","rslave"],
                  "uidMappings":{map},"gidMappings":{map}}},
                {{"destination":"/both","type":"bind","source":"/srv/both","options":["rbind","rshared"],
                  "uidMappings":{map},"gidMappings":{map}}}]}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn runc_sees_plain_binds_of_what_is_mapped() {
        let mut spec = spec();
        let wanted = take(&mut spec, Path::new("/mapped"));
        let told: Vec<_> = wanted
            .iter()
            .map(|one| (one.source.to_str().unwrap(), one.destination.to_str().unwrap(), one.propagation))
            .collect();
        assert_eq!(
            told,
            [
                ("/srv/data", "/data", Some(MsFlags::MS_PRIVATE)),
                ("/srv/follows", "/follows", Some(MsFlags::MS_SLAVE)),
                ("/srv/both", "/both", None),
            ]
        );
        let mounts = spec.mounts().as_ref().unwrap();
        let sources: Vec<_> =
            mounts.iter().map(|mount| mount.source().as_ref().unwrap().to_str().unwrap()).collect();
        assert_eq!(sources, ["proc", "/mapped/0", "/srv/plain", "/mapped/1", "/mapped/2"]);
        assert!(mounts.iter().all(|one| one.uid_mappings().is_none() && one.gid_mappings().is_none()));
    }

    #[test]
    fn only_what_is_empty_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let [full, written, empty, touched, missing] = [0, 1, 2, 3, 4].map(|n| point(folder.path(), n));
        fs::create_dir_all(full.join("precious")).unwrap();
        fs::write(&written, "precious").unwrap();
        fs::create_dir(&empty).unwrap();
        fs::write(&touched, "").unwrap();
        assert!(remove_mount_point(&full).is_err());
        assert!(remove_mount_point(&written).unwrap_err().to_string().contains("not empty"));
        for gone in [empty, touched, missing] {
            remove_mount_point(&gone).unwrap();
            assert!(!gone.exists());
        }
        assert!(full.join("precious").exists() && written.exists());
    }

    #[test]
    fn the_file_system_of_a_mount_is_named() {
        let table = "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
                     221 22 0:25 /a /srv rw shared:2 master:1 - tmpfs none rw\n";
        assert_eq!(filesystem_in(table, "22").unwrap(), "ext4");
        assert_eq!(filesystem_in(table, "221").unwrap(), "tmpfs");
        assert_eq!(filesystem_in(table, "2"), None);
        assert_eq!(filesystem_of(Path::new("/proc/self/status")), "proc");
    }
}
