//! Network namespaces: made, pinned, entered and removed.
//!
//! A namespace lives as long as something refers to it. A bind mount of it
//! under `/run/netns`, where `ip netns` and CNI plugins look, keeps it without
//! a process. A thread that has entered one is never used for anything else:
//! it ends with its work, so that no tokio worker can be left in a pod.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use husk_base::{blocking, crash};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use tokio::sync::oneshot;

/// The folder in which `ip netns` pins namespaces.
const DIRECTORY: &str = "/run/netns";

/// The deadline of huskd's own work in a namespace, which is a few calls of the kernel.
const DEADLINE: Duration = Duration::from_secs(30);

/// A namespace could not be made, entered or removed.
#[derive(Debug, thiserror::Error)]
#[error("network namespace {path}: {step}", path = path.display())]
pub struct Error {
    path: PathBuf,
    step: &'static str,
    source: io::Error,
}

impl Error {
    fn new(path: &Path, step: &'static str, source: impl Into<io::Error>) -> Self {
        Self { path: path.to_owned(), step, source: source.into() }
    }
}

/// The file that pins the namespace of a sandbox. Thirteen characters of an id are
/// what people and tools show of it.
#[must_use]
pub fn path_of(sandbox_id: &str) -> PathBuf {
    let short: String = sandbox_id.chars().take(13).collect();
    Path::new(DIRECTORY).join(format!("husk-{short}"))
}

/// True when a namespace is pinned at `path`; a file that is left of a crash
/// between two steps is none.
pub async fn exists(path: &Path) -> bool {
    let path = path.to_owned();
    blocking(move || statfs(&path).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC)).await
}

/// Makes a namespace with its loopback interface up, and pins it at `path`.
///
/// # Errors
/// Nothing is left then.
#[expect(clippy::disallowed_methods, reason = "it runs on a thread of its own")]
pub async fn create(path: &Path) -> Result<(), Error> {
    let pin = path.to_owned();
    on_own_thread(path, move || {
        prepare_directory().map_err(|error| Error::new(Path::new(DIRECTORY), "prepare", error))?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&pin)
            .map_err(|error| Error::new(&pin, "create", error))?;
        crash::point("file of a network namespace made");
        let made = unshare_and_pin(&pin);
        crash::point("network namespace pinned");
        if made.is_err() {
            let _ = unpin(&pin);
        }
        made
    })
    .await?
}

fn unshare_and_pin(path: &Path) -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::new(path, "unshare", errno))?;
    with_netlink(async |netlink| {
        let up = rtnetlink::LinkUnspec::new_with_index(1).up().build();
        netlink.link().set(up).execute().await.map_err(io::Error::other)
    })
    .and_then(|up| up)
    .map_err(|error| Error::new(path, "bring lo up", error))?;
    // The thread's own entry: /proc/self is the process's first thread.
    let this = Path::new("/proc/thread-self/ns/net");
    mount(Some(this), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|errno| Error::new(path, "pin", errno))
}

/// Runs `work` on a thread in the namespace that is pinned at `path`.
///
/// # Errors
/// When the namespace cannot be entered, or the deadline has passed.
#[expect(clippy::disallowed_methods, reason = "it runs on a thread of its own")]
pub async fn run<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let pin = path.to_owned();
    on_own_thread(path, move || {
        let file = File::open(&pin).map_err(|error| Error::new(&pin, "open", error))?;
        setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| Error::new(&pin, "enter", errno))?;
        Ok(work())
    })
    .await?
}

/// Runs `work` on a thread in a new namespace, which ends with it.
///
/// # Errors
/// When there cannot be one, or the deadline has passed.
pub async fn run_in_new<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let nowhere = Path::new("(new)");
    on_own_thread(nowhere, move || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::new(nowhere, "unshare", errno))?;
        Ok(work())
    })
    .await?
}

/// Unpins a namespace; it ends with the last process, descriptor and packet
/// that refers to it. One that does not exist is fine.
///
/// # Errors
/// The kernel's.
pub async fn remove(path: &Path) -> Result<(), Error> {
    let path = path.to_owned();
    blocking(move || unpin(&path)).await
}

/// As [`remove`]. The call blocks.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
fn unpin(path: &Path) -> Result<(), Error> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // Not there, or a file that nothing was mounted on yet.
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
        Err(errno) => return Err(Error::new(path, "unmount", errno)),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::new(path, "remove", error)),
        _ => Ok(()),
    }
}

/// Connects to the kernel's rtnetlink in the namespace of this thread, which
/// must not be a tokio worker.
///
/// # Errors
/// When there is no connection, or the deadline has passed.
pub fn with_netlink<T>(work: impl AsyncFnOnce(rtnetlink::Handle) -> T) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        // Ends with the runtime.
        tokio::spawn(connection);
        Ok(tokio::time::timeout(DEADLINE, work(handle)).await?)
    })
}

/// Makes `/run/netns` a shared mount as `ip netns add` does. If it did so
/// later, over pins of ours, they would stay below its mount and keep their
/// namespaces for ever.
#[expect(clippy::disallowed_methods, reason = "it runs on a thread of its own")]
fn prepare_directory() -> io::Result<()> {
    static PREPARING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = PREPARING.lock();
    fs::create_dir_all(DIRECTORY)?;
    let share =
        || mount(None::<&str>, DIRECTORY, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    match share() {
        // The directory is not a mount point yet.
        Err(Errno::EINVAL) => {
            mount(
                Some(DIRECTORY),
                DIRECTORY,
                None::<&str>,
                MsFlags::MS_BIND | MsFlags::MS_REC,
                None::<&str>,
            )?;
            share()?;
        }
        shared => shared?,
    }
    Ok(())
}

/// Runs `work` on a thread of its own, which ends with it.
async fn on_own_thread<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (answer, answered) = oneshot::channel();
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(move || {
            let _ = answer.send(work());
        })
        .map_err(|error| Error::new(path, "start a thread", error))?;
    let lost = |reason| Error::new(path, "work in it", io::Error::other(reason));
    match tokio::time::timeout(DEADLINE + Duration::from_secs(5), answered).await {
        Ok(answer) => answer.map_err(|_| lost("its thread panicked")),
        Err(_) => Err(lost("its thread is stuck in the kernel")),
    }
}
