//! The file server, and the requests of a hostile guest's kernel: in any order, to nodes and handles that it was told of
//! and to others. The server works in a thread whose root is a folder of its own, with fewer capabilities than it has
//! in a pod: it makes no devices.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use husk_fs::identity::{CAPABILITIES, set_effective};
use husk_fs::{Passthrough, Policy};
use rustix::thread::CapabilitySet;

use crate::apart::{self, Apart};
use crate::input::{Input, Output};

const FILES: &str = "files";
/// Most requests of an input.
const MAX_REQUESTS: usize = 60;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// The longest answer that the VMM takes.
const MAX_ANSWER: usize = (128 << 10) + (4 << 10);
/// Descriptors that the server may have open.
const OPEN_FILES: usize = 256;
/// Bytes that a file may have.
const MAX_FILE: u64 = 1 << 20;

/// The server's working directory: it knows files by the numbers of their descriptors.
#[allow(clippy::unwrap_used)]
static DESCRIPTORS: LazyLock<fs::File> = LazyLock::new(|| fs::File::open("/proc/self/fd").unwrap());

static WORKER: LazyLock<Apart> = LazyLock::new(|| {
    // The thread's root has no `/proc`.
    LazyLock::force(&DESCRIPTORS);
    Apart::start("fuse", begin, serve)
});

/// Names of files: some that are there, and some that lead elsewhere.
const NAMES: [&[u8]; 12] = [
    b"file\0",
    b"dir\0",
    b"link\0",
    b"new\0",
    b"other\0",
    b"..\0",
    b".\0",
    b"../outside\0",
    b"/\0",
    b"\0",
    b"x",
    b"sub\0",
];

/// Serves one guest.
pub fn run(data: &[u8]) {
    WORKER.run(data);
}

#[allow(clippy::unwrap_used)]
fn begin() {
    set_effective(CAPABILITIES.difference(CapabilitySet::MKNOD)).unwrap();
    let limit = libc::rlimit { rlim_cur: MAX_FILE, rlim_max: MAX_FILE };
    // SAFETY: the kernel reads `limit`; the signal is ignored, which calls nothing.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
        libc::umask(0);
    }
}

/// The files of a volume, in the folder of the thread.
#[allow(clippy::unwrap_used)]
fn volume() {
    apart::fresh(FILES);
    let files = Path::new("/").join(FILES);
    fs::create_dir_all(files.join("dir/sub")).unwrap();
    fs::write(files.join("file"), b"content").unwrap();
    std::os::unix::fs::symlink("../outside", files.join("link")).unwrap();
}

#[allow(clippy::unwrap_used)]
fn serve(data: &[u8]) {
    let mut input = Input::new(data);
    let policy = match input.byte() % 3 {
        0 => Policy::default(),
        1 => Policy { trusted: Some("trusted".into()), ..Policy::default() },
        _ => Policy {
            uids: vec!["0:10".parse().unwrap()],
            gids: vec!["0:10".parse().unwrap()],
            ..Policy::default()
        },
    };
    volume();
    let files = Passthrough::new(&Path::new("/").join(FILES), OPEN_FILES, policy).unwrap();
    rustix::process::fchdir(&*DESCRIPTORS).unwrap();
    let mut guest = Guest { nodes: vec![1], handles: vec![0] };
    let mut buffer = Vec::new();
    for number in 1..=MAX_REQUESTS as u64 {
        let Some(opcode) = input.next() else { break };
        let request = guest.request(opcode, number, &mut input);
        let Some(answer) = files.answer(&request, &mut buffer) else { continue };
        guest.hear(opcode.into(), number, answer);
    }
    drop(files);
    std::env::set_current_dir("/").unwrap();
    apart::check(&[FILES]);
}

/// What the guest's kernel was told.
struct Guest {
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Guest {
    fn one_of(known: &[u64], input: &mut Input) -> u64 {
        match usize::from(input.byte()) {
            255 => input.u64(),
            which => known[which % known.len()],
        }
    }

    /// A request: its header, and then parts, each a struct's bytes, a name, a node or a handle.
    fn request(&self, opcode: u8, number: u64, input: &mut Input) -> Vec<u8> {
        let node = Self::one_of(&self.nodes, input);
        let (uid, gid) = (u32::from(input.byte() % 16), u32::from(input.byte() % 16));
        let mut body = Vec::new();
        for _ in 0..8 {
            match input.byte() % 8 {
                0 => break,
                1 => body.extend_from_slice(&Self::one_of(&self.handles, input).to_le_bytes()),
                2 => body.extend_from_slice(&Self::one_of(&self.nodes, input).to_le_bytes()),
                3 | 4 => body.extend_from_slice(NAMES[usize::from(input.byte()) % NAMES.len()]),
                5 => body.extend_from_slice(&input.u32().to_le_bytes()),
                6 => body.extend_from_slice(&u64::from(input.u16()).to_le_bytes()),
                _ => {
                    let length = input.byte();
                    body.extend_from_slice(input.bytes(length.into()));
                }
            }
        }
        let length = u32::try_from(IN_HEADER + body.len()).unwrap_or_default();
        let head = Output::default().u32(length).u32(opcode.into()).u64(number).u64(node).u32(uid).u32(gid);
        head.u32(1).u32(0).bytes(&body).0
    }

    /// Holds against an answer what the VMM takes for one, and notes what it names.
    fn hear(&mut self, opcode: u32, number: u64, answer: &[u8]) {
        let word = |at: usize| {
            u64::from_le_bytes(std::array::from_fn(|byte| answer.get(at + byte).copied().unwrap_or_default()))
        };
        assert!((OUT_HEADER..=MAX_ANSWER).contains(&answer.len()), "an answer of {} bytes", answer.len());
        let (length, error) = (word(0) as u32, (word(0) >> 32) as u32 as i32);
        assert_eq!((length as usize, word(8)), (answer.len(), number));
        assert!((-4095..=0).contains(&error), "errno {error}");
        if error != 0 {
            assert_eq!(answer.len(), OUT_HEADER, "an error with more behind it");
            return;
        }
        match opcode {
            // LOOKUP, SYMLINK, MKNOD, MKDIR, LINK.
            1 | 6 | 8 | 9 | 13 => self.nodes.push(word(16)),
            // OPEN, OPENDIR.
            14 | 27 => self.handles.push(word(16)),
            // CREATE.
            35 => {
                self.nodes.push(word(16));
                self.handles.push(word(16 + 128));
            }
            _ => {}
        }
    }
}

/// Guests to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    /// A request to a node, with its parts.
    fn ask(output: Output, opcode: u8, node: u8, parts: &[&[u8]]) -> Output {
        parts
            .iter()
            .fold(output.byte(opcode).byte(node).byte(0).byte(0), |output, part| output.bytes(part))
            .byte(0)
    }
    const HANDLE: &[u8] = &[1, 1];
    const NONE: &[u8] = &[6, 0, 0];
    let name = |which: u8| [3, which];
    let word = |value: u32| Output::default().byte(5).u32(value).0;
    let begin =
        |policy: u8| ask(Output::default().byte(policy), 26, 0, &[&word(7), &word(36), &word(0), &word(0)]);
    let read = ask(begin(0), 1, 0, &[&name(0)]);
    let read = ask(read, 14, 1, &[&word(2), &word(0)]);
    let read = ask(read, 15, 1, &[HANDLE, NONE, &word(4096), &word(0), NONE, NONE]);
    let read = ask(read, 16, 1, &[HANDLE, NONE, &word(4), &word(0), NONE, NONE, &[7, 4, 1, 2, 3, 4]]);
    let read = ask(ask(ask(read, 3, 1, &[NONE, NONE]), 18, 1, &[HANDLE, NONE, NONE]), 2, 1, &[&[6, 1, 0]]);
    let list = ask(begin(1), 27, 0, &[&word(0), &word(0)]);
    let list = ask(list, 44, 0, &[HANDLE, NONE, &word(4096), &word(0), NONE, NONE]);
    let list = ask(ask(list, 28, 0, &[HANDLE, NONE, &word(4096), &word(0), NONE, NONE]), 17, 0, &[]);
    let make = ask(begin(2), 9, 0, &[&word(0o755), &word(0), &name(3)]);
    let make = ask(make, 35, 1, &[&word(2), &word(0o644), &word(0), &word(0), &name(4)]);
    let make =
        ask(ask(make, 8, 1, &[&word(0o10644), NONE, &word(0), &name(0)]), 6, 0, &[&name(11), &name(7)]);
    let make = ask(ask(make, 12, 1, &[&[2, 0], &name(4), &name(3)]), 5, 0, &[]);
    let make = ask(
        ask(make, 21, 2, &[&word(1), &word(0), &[7, 7], b"user.a\0", &[7, 1, 1]]),
        23,
        2,
        &[&word(64), &word(0)],
    );
    let make = ask(ask(make, 10, 1, &[&name(4)]), 11, 0, &[&name(3)]);
    let out = ask(ask(begin(0), 1, 0, &[&name(7)]), 1, 0, &[&name(2)]);
    vec![read.0, list.0, make.0, ask(ask(out, 5, 1, &[]), 14, 1, &[&word(0), &word(0)]).0]
}
