//! Synced volumes: the host copies them into the pod, and again when they
//! change. These are the kubelet's ConfigMaps and Secrets.
//!
//! A change appears as it does on the host: new directories are complete before
//! the link to them is renamed into its place, and old ones are removed last.
//! Programs that wait for it with inotify see the same events.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use husk_proto::agent::{VolumeEntry, paths::SYNCED};

/// Most entries of one volume.
const MAX_ENTRIES: usize = 4096;

/// The name of a link before it is renamed.
const TEMPORARY: &str = "..husk_tmp";

/// A volume could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is invalid.
    #[error("{0}")]
    Invalid(String),
    /// A file of the volume could not be written.
    #[error("{path}: {cause}")]
    File { path: PathBuf, cause: io::Error },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |cause| Error::File { path, cause }
}

/// Makes the content of the volume `name` equal to `entries`.
pub fn write(name: &str, entries: &[VolumeEntry]) -> Result<(), Error> {
    write_below(&Path::new(SYNCED).join(name), entries)
}

fn write_below(root: &Path, entries: &[VolumeEntry]) -> Result<(), Error> {
    if entries.len() > MAX_ENTRIES {
        return Err(Error::Invalid(format!("a volume of more than {MAX_ENTRIES} files")));
    }
    for entry in entries {
        let path = Path::new(&entry.path);
        if entry.path.is_empty() || !path.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(Error::Invalid(format!("`{}` is no path in a volume", entry.path)));
        }
    }
    fs::create_dir_all(root).map_err(at(root))?;
    let kind = |wanted: u32| move |entry: &&VolumeEntry| entry.mode & libc::S_IFMT == wanted;
    // A directory comes before its content.
    let mut directories: Vec<_> = entries.iter().filter(kind(libc::S_IFDIR)).collect();
    directories.sort_by_key(|entry| &entry.path);
    for entry in &directories {
        let path = root.join(&entry.path);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(&path)(error)),
            _ => {}
        }
    }
    for entry in entries.iter().filter(kind(libc::S_IFREG)) {
        write_file(root, entry)?;
    }
    for entry in &directories {
        set_access(&root.join(&entry.path), entry)?;
    }
    for entry in entries.iter().filter(kind(libc::S_IFLNK)) {
        write_link(root, entry)?;
    }
    let wanted: BTreeSet<&Path> = entries.iter().map(|entry| Path::new(&entry.path)).collect();
    remove_others(root, Path::new(""), &wanted)
}

fn write_file(root: &Path, entry: &VolumeEntry) -> Result<(), Error> {
    let path = root.join(&entry.path);
    if fs::read(&path).is_ok_and(|old| old == entry.content) {
        return set_access(&path, entry);
    }
    // The file is complete before it gets its name, because a program may read
    // the old one.
    let new = root.join(TEMPORARY);
    let _ = fs::remove_file(&new);
    let mut options = fs::File::options();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&new).map_err(at(&new))?;
    file.write_all(&entry.content).map_err(at(&new))?;
    set_access(&new, entry)?;
    fs::rename(&new, &path).map_err(at(&path))
}

fn set_access(path: &Path, entry: &VolumeEntry) -> Result<(), Error> {
    chown(path, Some(entry.uid), Some(entry.gid)).map_err(at(path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(entry.mode & 0o7777)).map_err(at(path))
}

fn write_link(root: &Path, entry: &VolumeEntry) -> Result<(), Error> {
    let path = root.join(&entry.path);
    let target = PathBuf::from(OsString::from_vec(entry.content.clone()));
    if fs::read_link(&path).is_ok_and(|old| old == target) {
        return Ok(());
    }
    let new = root.join(TEMPORARY);
    let _ = fs::remove_file(&new);
    symlink(&target, &new).map_err(at(&new))?;
    lchown(&new, Some(entry.uid), Some(entry.gid)).map_err(at(&new))?;
    fs::rename(&new, &path).map_err(at(&path))
}

/// Removes the entries that are not wanted. Links go before their targets.
fn remove_others(root: &Path, inside: &Path, wanted: &BTreeSet<&Path>) -> Result<(), Error> {
    let folder = root.join(inside);
    let mut directories = Vec::new();
    for found in fs::read_dir(&folder).map_err(at(&folder))? {
        let found = found.map_err(at(&folder))?;
        let path = inside.join(found.file_name());
        let full = root.join(&path);
        if found.file_type().map_err(at(&full))?.is_dir() {
            directories.push(path);
        } else if !wanted.contains(path.as_path()) {
            fs::remove_file(&full).map_err(at(&full))?;
        }
    }
    for path in directories {
        if wanted.contains(path.as_path()) {
            remove_others(root, &path, wanted)?;
        } else {
            let full = root.join(&path);
            fs::remove_dir_all(&full).map_err(at(&full))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn entry(path: &str, mode: u32, content: &str) -> VolumeEntry {
        let me = fs::metadata("/proc/self").unwrap();
        VolumeEntry { path: path.into(), mode, uid: me.uid(), gid: me.gid(), content: content.into() }
    }

    fn configmap(version: &str, keys: &[&str]) -> Vec<VolumeEntry> {
        let folder = format!("..{version}");
        let mut entries =
            vec![entry(&folder, libc::S_IFDIR | 0o755, ""), entry("..data", libc::S_IFLNK, &folder)];
        for key in keys {
            entries.push(entry(&format!("{folder}/{key}"), libc::S_IFREG | 0o640, version));
            entries.push(entry(key, libc::S_IFLNK, &format!("..data/{key}")));
        }
        entries
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_new_version_takes_the_place_of_the_old() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("v0");
        write_below(&root, &configmap("one", &["a", "b"])).unwrap();
        assert_eq!(fs::read_to_string(root.join("a")).unwrap(), "one");
        assert_eq!(fs::metadata(root.join("a")).unwrap().mode() & 0o777, 0o640);
        write_below(&root, &configmap("two", &["b", "c"])).unwrap();
        assert_eq!(names(&root), ["..data", "..two", "b", "c"]);
        assert_eq!(fs::read_to_string(root.join("b")).unwrap(), "two");
        // Nothing is written when nothing has changed.
        let before = fs::metadata(root.join("..two/b")).unwrap().ino();
        write_below(&root, &configmap("two", &["b", "c"])).unwrap();
        assert_eq!(fs::metadata(root.join("..two/b")).unwrap().ino(), before);
    }

    #[test]
    fn paths_stay_inside() {
        let folder = tempfile::tempdir().unwrap();
        for path in ["", "/etc/x", "../x", "a/../../x", "."] {
            let error = write_below(folder.path(), &[entry(path, libc::S_IFREG, "")]).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{path}");
        }
    }
}
