//! Removes what containers have written. They can make directories deeper than a path can
//! name and deeper than the stack allows, so paths stay short here and nothing recurses.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::crash;

/// Removes `root` and everything in it, without following links; a root that is not there
/// is removed already. Nobody may change the tree meanwhile.
///
/// # Errors
/// The file system's; another try removes the rest.
pub fn remove(root: &Path) -> io::Result<()> {
    if !root.is_dir() || root.is_symlink() {
        return Ok(());
    }
    crash::point("tree to be removed");
    // Each directory that is not empty moves up to the root before it is looked
    // into.
    let mut moved = 0u64;
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let path = entry.path();
            if !entry.file_type()?.is_dir() {
                fs::remove_file(&path)?;
            } else if fs::remove_dir(&path).is_err() {
                directories.push(if directory == root { path } else { move_up(root, &path, &mut moved)? });
            }
        }
        if directory != root {
            fs::remove_dir(&directory)?;
        }
    }
    fs::remove_dir(root)
}

fn move_up(root: &Path, path: &Path, moved: &mut u64) -> io::Result<PathBuf> {
    loop {
        *moved += 1;
        let up = root.join(format!(".removed-{moved}"));
        match fs::rename(path, &up) {
            Ok(()) => return Ok(up),
            // A container or an earlier try has used the name.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty
                        | io::ErrorKind::AlreadyExists
                        | io::ErrorKind::NotADirectory
                ) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_tree_deeper_than_a_path_can_name_goes() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("layer");
        // The tree is built bottom up, because a path to its end would be too long.
        let mut inner = folder.path().join("seed");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("file"), "x").unwrap();
        for level in 0..1500 {
            let outer = folder.path().join(format!("level-{level}"));
            fs::create_dir(&outer).unwrap();
            fs::rename(&inner, outer.join("deep")).unwrap();
            inner = outer;
        }
        fs::create_dir(&root).unwrap();
        fs::create_dir(root.join(".removed-1")).unwrap();
        fs::write(root.join(".removed-1/mine"), "x").unwrap();
        fs::rename(&inner, root.join("top")).unwrap();
        remove(&root).unwrap();
        assert!(!root.exists());
    }

    #[test]
    fn links_do_not_lead_away() {
        let folder = tempfile::tempdir().unwrap();
        let kept = folder.path().join("kept");
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "x").unwrap();
        let root = folder.path().join("layer");
        fs::create_dir_all(root.join("inner")).unwrap();
        symlink(&kept, root.join("away")).unwrap();
        symlink(&kept, root.join("inner/away")).unwrap();
        remove(&root).unwrap();
        assert!(!root.exists() && kept.join("file").exists());
        symlink(&kept, &root).unwrap();
        remove(&root).unwrap();
        assert!(kept.join("file").exists());
    }

    #[test]
    fn nothing_is_removed_already() {
        remove(Path::new("/nonexistent/husk")).unwrap();
    }
}
