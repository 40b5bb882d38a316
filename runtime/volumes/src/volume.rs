//! A container's volumes: the client's mounts are checked, and their files held open.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use husk_proto::cri;
use serde::{Deserialize, Serialize};

use crate::image::is_image;
use crate::{read, shared_dir, synced};

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

/// A container cannot have a volume.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense.
    #[error("mount of `{path}`: {problem}")]
    Invalid {
        /// The path in the container.
        path: String,
        /// The reason.
        problem: String,
    },
    /// The request makes sense, but a pod in a VM cannot have such a volume.
    #[error("mount of `{path}`: {problem}")]
    Unsupported {
        /// The path in the container.
        path: String,
        /// The part of the request, and what to do instead.
        problem: String,
    },
    /// A file or mount of the host.
    #[error("volume: {stage} {path}: {cause}")]
    File {
        /// The step that failed.
        stage: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        cause: std::io::Error,
    },
}

/// A volume of a container, as it is recorded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Volume {
    /// The volume's name in the shared directory.
    pub name: String,
    /// The file or directory of the host.
    pub source: Source,
    /// The way in which it is mounted on the host.
    pub mode: Mode,
    /// The path in the container.
    pub container_path: PathBuf,
    /// Whether the volume is copied into the guest, see [`synced`], and not mounted on the host.
    #[serde(default, rename = "live")]
    pub synced: bool,
    /// The state that the guest has of a synced volume. It is not recorded: a new huskd copies
    /// the volume anew.
    #[serde(skip)]
    pub copied: synced::Copied,
    /// Whether the volume is read-only in the container's mounts too. It is not if the host has
    /// mounts below it that may be written, because the guest sees one mount for all of them.
    pub read_only_inside: bool,
    /// Other options of the mount in the container.
    #[serde(default)]
    pub options: Vec<String>,
}

/// A file or directory of the host: the path, and the file that was found there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The path without links.
    pub path: PathBuf,
    pub(crate) device: u64,
    pub(crate) inode: u64,
    mount: u64,
}

/// The way in which a volume is mounted on the host, which bounds what the guest can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mode {
    /// Whether the mount is read-only. Mounts below it are not affected.
    pub read_only: bool,
    /// Whether mounts below it are read-only too.
    pub recursive: bool,
    /// Whether later mounts of the host below the volume appear in the container.
    pub follow: bool,
}

/// A volume whose file is held open, so that the file that was checked is the one that is
/// mounted.
#[derive(Debug)]
pub struct Prepared {
    /// The volume as it is recorded.
    pub volume: Volume,
    file: OwnedFd,
}

impl Prepared {
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Checks a container's mounts of the host's files, and makes directories that are not
/// there. `in_use` are the volumes that the pod's containers have. Volumes below
/// `trusted` get names by which the file server knows them.
///
/// # Errors
/// The first mount that the container cannot have.
pub fn prepare(
    mounts: &[cri::Mount],
    in_use: &[Volume],
    trusted: &[PathBuf],
) -> Result<Vec<Prepared>, Error> {
    let mut known = in_use.to_vec();
    let mut prepared = Vec::with_capacity(mounts.len());
    for mount in mounts.iter().filter(|mount| !is_image(mount)) {
        let one = prepare_one(mount, &known, trusted)?;
        known.push(one.volume.clone());
        prepared.push(one);
    }
    Ok(prepared)
}

fn prepare_one(mount: &cri::Mount, known: &[Volume], trusted: &[PathBuf]) -> Result<Prepared, Error> {
    let path = || mount.container_path.clone();
    let invalid = |problem: &str| Error::Invalid { path: path(), problem: problem.into() };
    let unsupported = |problem: &str| Error::Unsupported { path: path(), problem: problem.into() };

    let container_path = clean(&mount.container_path).ok_or_else(|| invalid("the path must be absolute"))?;
    let mode = mode(mount)?;
    let options = options(&mount.mount_options).map_err(|problem| invalid(&problem))?;
    if !Path::new(&mount.host_path).is_absolute() {
        return Err(invalid("host_path must be absolute"));
    }
    let (source, kind, file) = open(Path::new(&mount.host_path))?;
    if !kind.is_dir() && !kind.is_file() {
        let what = match kind {
            kind if kind.is_socket() => "a socket",
            kind if kind.is_fifo() => "a pipe",
            _ => "a device",
        };
        return Err(unsupported(&format!(
            "`{}` is {what}, and nobody outside of the pod's virtual machine can be reached through it: use a \
             runtime handler of host containers",
            source.path.display()
        )));
    }
    let read_only_inside = mode.read_only && (mode.recursive || !shared_dir::has_mounts_below(&source.path)?);
    let synced = mode.read_only && kind.is_dir() && read::is_synced(file.as_fd());
    let same =
        known.iter().find(|other| other.source == source && other.mode == mode && other.synced == synced);
    let trusted = trusted.iter().any(|folder| source.path.starts_with(folder));
    let name = same.map_or_else(|| free_name(known, trusted), |other| other.name.clone());
    let copied = same.map(|other| other.copied.clone()).unwrap_or_default();
    let volume = Volume { name, source, mode, container_path, synced, copied, read_only_inside, options };
    Ok(Prepared { volume, file })
}

/// The options of a mount, which may only restrict the use of its files (mount(8)).
///
/// # Errors
/// An option that does something else.
pub fn options(asked: &[String]) -> Result<Vec<String>, String> {
    const KNOWN: [&str; 12] = [
        "exec",
        "noexec",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "strictatime",
    ];
    match asked.iter().find(|option| !KNOWN.contains(&option.as_str())) {
        Some(other) => Err(format!("mount option `{other}` is none of {}", KNOWN.join(", "))),
        None => Ok(asked.to_vec()),
    }
}

fn mode(mount: &cri::Mount) -> Result<Mode, Error> {
    let path = || mount.container_path.clone();
    let propagation = cri::MountPropagation::try_from(mount.propagation).map_err(|_| Error::Invalid {
        path: path(),
        problem: format!("unknown propagation {}", mount.propagation),
    })?;
    let follow = match propagation {
        cri::MountPropagation::PropagationPrivate => false,
        cri::MountPropagation::PropagationHostToContainer => true,
        cri::MountPropagation::PropagationBidirectional => {
            return Err(Error::Unsupported {
                path: path(),
                problem: "a mount that is made in a virtual machine cannot appear on the host: use \
                          HostToContainer, or a runtime handler of host containers"
                    .into(),
            });
        }
    };
    if mount.recursive_read_only && (!mount.readonly || follow) {
        return Err(Error::Invalid {
            path: path(),
            problem: "recursive_read_only needs readonly, and private propagation".into(),
        });
    }
    Ok(Mode { read_only: mount.readonly, recursive: mount.recursive_read_only, follow })
}

/// The path without `.` and `..`; `None` if it is not absolute.
#[must_use]
pub fn clean(path: &str) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::RootDir => clean.push("/"),
            Component::ParentDir => {
                clean.pop();
            }
            Component::Normal(name) => clean.push(name),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean.is_absolute().then_some(clean)
}

/// Opens a file or directory, following the host's links. A directory is made if there is
/// nothing, as other runtimes do it.
pub(crate) fn open(path: &Path) -> Result<(Source, std::fs::FileType, OwnedFd), Error> {
    let file = |stage| {
        let path = path.to_owned();
        move |cause| Error::File { stage, path, cause }
    };
    let resolved = match path.canonicalize() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(path).map_err(file("make directory"))?;
            path.canonicalize()
        }
        found => found,
    };
    let resolved = resolved.map_err(file("find"))?;
    let held = shared_dir::open_path(&resolved).map_err(file("open"))?;
    let held = std::fs::File::from(held);
    let metadata = held.metadata().map_err(file("look at"))?;
    let held = OwnedFd::from(held);
    let mount = shared_dir::mount_id(held.as_fd()).map_err(file("look at"))?;
    let source = Source { path: resolved, device: metadata.dev(), inode: metadata.ino(), mount };
    Ok((source, metadata.file_type(), held))
}

/// The prefix of the names of trusted volumes, which no others have.
pub const TRUSTED: &str = "t";

fn free_name(known: &[Volume], trusted: bool) -> String {
    let prefix = if trusted { TRUSTED } else { "v" };
    let mut number = 0u32;
    loop {
        let name = format!("{prefix}{number}");
        if known.iter().all(|volume| volume.name != name) {
            return name;
        }
        number += 1;
    }
}
