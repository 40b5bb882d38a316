//! One huskd to a run folder and a state folder, and the two belong together.
//!
//! A pod that lives in the run folder and has no record in the state folder is ended
//! when huskd starts. So it must be certain beforehand that the state folder is the
//! right one: its disk may not be mounted yet, the configuration may have changed,
//! or a second huskd may have been started.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use husk_backend::Place;
use husk_base::blocking;
use husk_base::dirs::{self, TRAVERSE_ONLY};
use husk_base::id::SandboxId;
use husk_base::record::{self, Durability, ReadError, Unknown};
use husk_config::Config;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

/// The file that the huskd which uses a folder holds locked.
const LOCK: &str = "huskd.lock";

/// The file with a folder's identity.
const IDENTITY: &str = "huskd.json";

/// How long a huskd that is about to end is waited for.
const PREDECESSOR: Duration = Duration::from_secs(3);

/// The identity that both folders hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    id: String,
    /// Where this state's pods live.
    run_dir: PathBuf,
}

/// This huskd has its folders to itself, for as long as this is kept.
#[derive(Debug)]
pub struct Instance {
    _run_dir: Flock<File>,
    _state_dir: Flock<File>,
}

impl Instance {
    /// Takes the folders of the configuration.
    ///
    /// # Errors
    /// Another huskd has one of them, or what lives in the run folder is not this
    /// state's.
    pub async fn claim(config: &Config) -> anyhow::Result<Self> {
        let (run_dir, state_dir) = (&config.run_dir, &config.state_dir);
        let run_lock = lock(run_dir).await?;
        let (in_state, in_run) = (identity(state_dir).await?, identity(run_dir).await?);
        if let Some(earlier) = in_state.as_ref().map(|state| &state.run_dir).filter(|dir| *dir != run_dir) {
            let living = living(earlier).await.len();
            if living > 0 {
                bail!(
                    "{living} pods of {} live below {}, which is no longer the `run_dir` of the configuration: set it \
                     back, or stop and remove them first",
                    state_dir.display(),
                    earlier.display()
                );
            }
        }
        let living = living(run_dir).await;
        let same = in_state.is_some() && in_state == in_run;
        // Before there were identities, and where one was removed, the records say it.
        let ours = same || (in_run.is_none() && has_record_of(state_dir, &living).await);
        if !living.is_empty() && !ours {
            bail!(
                "{} pods live below {}, and {} is not the state of the huskd that started them: it would end them as \
                 orphans. If its disk is not mounted yet, mount it and start huskd again; if `state_dir` or `run_dir` \
                 of the configuration was changed, set it back; to give the pods up, end their processes (`husk-vmm`, \
                 `husk-agent --host`) and remove {}",
                living.len(),
                run_dir.display(),
                state_dir.display(),
                run_dir.join("sandboxes").display(),
            );
        }
        let state_lock = lock(state_dir).await?;
        let id = in_state.as_ref().map(|state| state.id.clone());
        let ours =
            Identity { id: id.unwrap_or_else(|| SandboxId::random().to_string()), run_dir: run_dir.clone() };
        for (folder, found) in [(state_dir, in_state), (run_dir, in_run)] {
            if found.as_ref() != Some(&ours) {
                let (path, identity) = (folder.join(IDENTITY), ours.clone());
                blocking(move || write_identity(&path, &identity)).await?;
            }
        }
        Ok(Self { _run_dir: run_lock, _state_dir: state_lock })
    }
}

/// Locks a folder, which is made if there is none. The lock goes with this process,
/// however that ends: no child inherits it.
async fn lock(folder: &Path) -> anyhow::Result<Flock<File>> {
    let folder = folder.to_owned();
    blocking(move || wait_for_lock(&folder)).await
}

#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn wait_for_lock(folder: &Path) -> anyhow::Result<Flock<File>> {
    dirs::make(folder, TRAVERSE_ONLY).with_context(|| format!("make folder {}", folder.display()))?;
    let path = folder.join(LOCK);
    let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = open().with_context(|| format!("open {}", path.display()))?;
    let deadline = Instant::now() + PREDECESSOR;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // For the message below, of another one.
                let _ = lock.set_len(0);
                let _ = lock.rewind().and_then(|()| write!(lock, "{}", std::process::id()));
                return Ok(lock);
            }
            Err((back, Errno::EAGAIN)) if Instant::now() < deadline => file = back,
            Err((mut back, Errno::EAGAIN)) => {
                let mut holder = String::new();
                let _ = back.read_to_string(&mut holder);
                bail!(
                    "another huskd (process {}) uses {}: stop it first, or give this one folders of its own",
                    holder.trim(),
                    folder.display()
                );
            }
            Err((_, errno)) => return Err(errno).with_context(|| format!("lock {}", path.display())),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The identity of a folder; `None` if it has none yet.
async fn identity(folder: &Path) -> anyhow::Result<Option<Identity>> {
    let path = folder.join(IDENTITY);
    blocking(move || read_identity(&path)).await
}

#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn read_identity(path: &Path) -> anyhow::Result<Option<Identity>> {
    match record::read(path) {
        Ok((identity, _)) => Ok(Some(identity)),
        Err(ReadError::File(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn write_identity(path: &Path, identity: &Identity) -> anyhow::Result<()> {
    record::write(path, identity, &Unknown::default(), Durability::Acknowledged)
        .with_context(|| format!("write {}", path.display()))
}

/// The folders of pods below a run folder in which somebody still listens.
async fn living(run_dir: &Path) -> Vec<PathBuf> {
    let mut living = Vec::new();
    for path in below(run_dir.join("sandboxes")).await {
        if Place::anything_lives(&path).await {
            living.push(path);
        }
    }
    living
}

/// Whether a state folder has the record of one of these pods.
async fn has_record_of(state_dir: &Path, living: &[PathBuf]) -> bool {
    let recorded = below(state_dir.join("sandboxes")).await;
    let names = recorded.iter().filter_map(|path| path.file_name());
    let mut ids = names.map(|name| SandboxId::from(name.to_string_lossy().as_ref()));
    ids.any(|id| living.iter().any(|path| path.file_name().is_some_and(|name| name == id.short())))
}

/// The entries of a folder; none of one that cannot be read.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
async fn below(folder: PathBuf) -> Vec<PathBuf> {
    blocking(|| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect())
        .await
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    fn config(folder: &Path, state: &str, run: &str) -> Config {
        Config { state_dir: folder.join(state), run_dir: folder.join(run), ..Config::default() }
    }

    /// A pod that lives.
    fn pod(run_dir: &Path, id: &SandboxId) -> OwnedFd {
        let run_dir = dirs::sandbox_run_dir(run_dir, id);
        fs::create_dir_all(&run_dir).unwrap();
        husk_vm::listen_seqpacket(&run_dir.join("vmm.sock")).unwrap()
    }

    #[tokio::test]
    async fn a_folder_has_one_huskd_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let first = Instance::claim(&config(folder.path(), "state", "run")).await.unwrap();
        for (state, run) in [("state", "run"), ("other", "run"), ("state", "other")] {
            let refused = Instance::claim(&config(folder.path(), state, run)).await.unwrap_err().to_string();
            let process = format!("another huskd (process {})", std::process::id());
            assert!(refused.contains(&process), "{refused}");
        }
        drop(first);
        Instance::claim(&config(folder.path(), "state", "run")).await.unwrap();
    }

    #[tokio::test]
    async fn pods_are_not_ended_by_a_huskd_that_has_not_their_state() {
        let folder = tempfile::tempdir().unwrap();
        let here = config(folder.path(), "state", "run");
        drop(Instance::claim(&here).await.unwrap());
        let id = SandboxId::random();
        let machine = pod(&here.run_dir, &id);
        let refused = |config| async move { Instance::claim(&config).await.unwrap_err().to_string() };
        // A disk that is not mounted, and the disk of another node.
        let unmounted = refused(config(folder.path(), "unmounted", "run")).await;
        assert!(unmounted.contains("mount it and start huskd again"), "{unmounted}");
        drop(Instance::claim(&config(folder.path(), "other", "elsewhere")).await.unwrap());
        assert!(refused(config(folder.path(), "other", "run")).await.contains("set it back"));
        // The right state, but not where its pods live.
        let moved = refused(config(folder.path(), "state", "empty")).await;
        assert!(moved.contains("no longer the `run_dir`"), "{moved}");
        drop(Instance::claim(&here).await.unwrap());
        // Once they have gone, anybody may begin there.
        drop(machine);
        Instance::claim(&config(folder.path(), "unmounted", "run")).await.unwrap();
    }

    #[tokio::test]
    async fn pods_of_a_release_without_identities_are_known_by_their_records() {
        let folder = tempfile::tempdir().unwrap();
        let here = config(folder.path(), "state", "run");
        let id = SandboxId::random();
        let _machine = pod(&here.run_dir, &id);
        Instance::claim(&here).await.unwrap_err();
        fs::create_dir_all(here.state_dir.join("sandboxes").join(id.as_str())).unwrap();
        drop(Instance::claim(&here).await.unwrap());
        // The pods are known from now on.
        Instance::claim(&config(folder.path(), "unmounted", "run")).await.unwrap_err();
    }
}
