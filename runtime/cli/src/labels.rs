//! The labels and annotations by which `husk` knows what it made, and where its files are.

use std::path::{Path, PathBuf};

use anyhow::Context;
use husk_config::Config;

/// The namespace of pods that `husk` makes.
pub const NAMESPACE: &str = "husk";

/// Label of a container, and of a pod that was made for one container: the container's name.
pub const NAME: &str = "husk.dev/name";

/// Annotation of a container: the seconds that `husk stop` gives it.
pub const STOP_TIMEOUT: &str = "husk.dev/stop-timeout";

/// Annotation of a pod and of a container: the directory of their logs and other files.
pub const FILES: &str = "husk.dev/files";

/// The directory below which all these directories are.
pub fn all_files(config: &Config) -> PathBuf {
    config.state_dir.join("command")
}

/// A new directory for the files of one pod or container.
///
/// # Errors
/// The kernel gives no random bytes.
pub fn new_files(config: &Config) -> anyhow::Result<PathBuf> {
    Ok(all_files(config).join(random_hex()?))
}

/// Removes a directory that [`new_files`] named. A path that is not one is left alone.
pub fn remove_files(config: &Config, files: Option<&String>) {
    let Some(files) = files.map(Path::new) else { return };
    if files.parent() == Some(&all_files(config))
        && let Err(error) = std::fs::remove_dir_all(files)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        eprintln!("husk: failed to remove {}: {error}", files.display());
    }
}

/// 16 random digits.
fn random_hex() -> anyhow::Result<String> {
    let mut random = [0; 8];
    husk_base::random::fill(&mut random).context("get random bytes")?;
    Ok(husk_base::id::hex(&random))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_of_its_own_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { state_dir: folder.path().to_owned(), ..Config::default() };
        let own = new_files(&config).unwrap();
        let other = folder.path().join("images");
        for path in [&own, &other] {
            std::fs::create_dir_all(path).unwrap();
        }
        for path in [own.clone(), other.clone(), own.join("../../images")] {
            remove_files(&config, Some(&path.display().to_string()));
        }
        remove_files(&config, None);
        assert_eq!((own.exists(), other.exists()), (false, true));
    }
}
