//! A thread whose root is a folder of its own, for what writes files: whatever leads out of the folder that it is to
//! stay in, as a path from the root or through `..`, still stays in the thread's root, and is found there.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// A file beside the folder that what is fuzzed works in.
const OUTSIDE: &str = "outside";
/// What is in it.
const CONTENT: &[u8] = b"nobody writes here";

/// The work of a thread, for one input.
type Work = fn(&[u8]);

/// Runs the work of each input on its thread.
pub struct Apart {
    inputs: SyncSender<Vec<u8>>,
    done: Mutex<Receiver<()>>,
}

impl Apart {
    /// Starts the thread. `begin` is called first, in the thread's new root.
    #[must_use]
    #[allow(clippy::unwrap_used)]
    pub fn start(name: &str, begin: fn(), work: Work) -> Self {
        let root = root(name);
        let (inputs, take) = sync_channel::<Vec<u8>>(0);
        let (tell, done) = sync_channel(0);
        std::thread::spawn(move || {
            enter(&root).unwrap();
            begin();
            for input in take {
                work(&input);
                tell.send(()).unwrap();
            }
        });
        Self { inputs, done: Mutex::new(done) }
    }

    /// Runs the work. It is done when this returns.
    #[allow(clippy::unwrap_used)]
    pub fn run(&self, input: &[u8]) {
        self.inputs.send(input.to_vec()).unwrap();
        self.done.lock().unwrap().recv().unwrap();
    }
}

/// The thread's root: a folder in memory, so that no disk is worn.
#[allow(clippy::unwrap_used)]
fn root(name: &str) -> PathBuf {
    let root = PathBuf::from(format!("/dev/shm/husk-fuzz-{name}"));
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(root.join("proc")).unwrap();
    // Nobody else shall meet what an input makes.
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(root.join(OUTSIDE), CONTENT).unwrap();
    root
}

fn enter(root: &Path) -> io::Result<()> {
    let path = std::ffi::CString::new(root.as_os_str().as_encoded_bytes())?;
    // SAFETY: unshare takes a number, and what it changes is the calling thread's alone; chroot reads a string that ends
    // with a zero.
    let results =
        unsafe { [libc::unshare(libc::CLONE_FS), libc::chroot(path.as_ptr()), libc::chdir(c"/".as_ptr())] };
    if results.contains(&-1) { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes an empty folder in the thread's root.
#[allow(clippy::unwrap_used)]
pub fn fresh(folder: &str) {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir(folder).unwrap();
}

/// Holds against what was fuzzed that it has written nothing outside of its folders.
///
/// # Panics
/// It has.
#[allow(clippy::unwrap_used)]
pub fn check(folders: &[&str]) {
    assert_eq!(
        fs::read(Path::new("/").join(OUTSIDE)).unwrap(),
        CONTENT,
        "a file outside of the folder was changed"
    );
    for entry in fs::read_dir("/").unwrap() {
        let name = entry.unwrap().file_name();
        let known = name == OUTSIDE || name == "proc" || folders.iter().any(|folder| name == *folder);
        assert!(known, "{} was made outside of the folder", name.display());
    }
}
