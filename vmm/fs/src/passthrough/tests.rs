//! Requests to a directory of the test, as a guest's kernel makes them.
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::Once;
use std::{fs, thread};

use proptest::prelude::*;
use tempfile::TempDir;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Passthrough;
use crate::abi::*;
use crate::filter;
use crate::policy::Policy;

mod policy;

struct Guest {
    files: Passthrough,
    folder: TempDir,
}

impl Guest {
    fn new() -> Self {
        Self::with_open_files(1024)
    }

    fn with_open_files(open_files: usize) -> Self {
        Self::with_policy(open_files, Policy::default())
    }

    fn with_policy(open_files: usize, policy: Policy) -> Self {
        static DESCRIPTORS: Once = Once::new();
        DESCRIPTORS.call_once(|| std::env::set_current_dir("/proc/self/fd").unwrap());
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        Self { files: Passthrough::new(folder.path(), open_files, policy).unwrap(), folder }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// Sends a request under the server's seccomp filter, as root. Returns the
    /// body of the answer, or the errno.
    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.ask_as((0, 0), opcode, node, body)
    }

    /// Sends a request as [`Self::ask`] does, as a user and a group.
    fn ask_as(&self, (uid, gid): (u32, u32), opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let len = (40 + body.len()) as u32;
        let header = InHeader { len, opcode, unique: 3, node, uid, gid, ..InHeader::default() };
        let packet = [header.as_bytes(), body].concat();
        let restricted = || {
            filter::install().unwrap();
            self.files.answer(&packet, &mut Vec::new()).unwrap().to_vec()
        };
        let answer = thread::scope(|scope| scope.spawn(restricted).join().unwrap());
        let (header, body) = OutHeader::read_from_prefix(&answer).unwrap();
        assert_eq!((header.len as usize, header.unique), (answer.len(), 3));
        if header.error == 0 { Ok(body.to_vec()) } else { Err(-header.error) }
    }

    fn get<T: FromBytes>(&self, opcode: u32, node: u64, body: &[u8]) -> Result<T, i32> {
        self.ask(opcode, node, body).map(|body| T::read_from_prefix(&body).ok().unwrap().0)
    }

    fn lookup(&self, node: u64, name: &str) -> Result<EntryOut, i32> {
        self.get(opcode::LOOKUP, node, &text(name))
    }

    fn open(&self, node: u64, flags: i32) -> Result<u64, i32> {
        let open = OpenIn { flags: flags as u32, open_flags: 0 };
        self.get::<OpenOut>(opcode::OPEN, node, open.as_bytes()).map(|opened| opened.handle)
    }

    fn forget(&self, node: u64, lookups: u64) {
        let header = InHeader { opcode: opcode::FORGET, node, ..InHeader::default() };
        let packet = [header.as_bytes(), lookups.as_bytes()].concat();
        assert!(self.files.answer(&packet, &mut Vec::new()).is_none());
    }

    fn list(&self, node: u64, opcode: u32, size: u32) -> Vec<String> {
        let open = OpenIn::default();
        let handle = self.get::<OpenOut>(opcode::OPENDIR, node, open.as_bytes()).unwrap().handle;
        let mut read = ReadIn { handle, size, ..ReadIn::default() };
        let mut names = Vec::new();
        loop {
            let entries = self.ask(opcode, node, read.as_bytes()).unwrap();
            assert!(entries.len() <= size as usize);
            let mut rest = entries.as_slice();
            if rest.is_empty() {
                return names;
            }
            while !rest.is_empty() {
                let mut len = 0;
                if opcode == opcode::READDIRPLUS {
                    len += size_of::<EntryOut>();
                }
                let (dirent, name) = Dirent::read_from_prefix(&rest[len..]).unwrap();
                names.push(String::from_utf8(name[..dirent.namelen as usize].to_vec()).unwrap());
                read.offset = dirent.offset;
                len += size_of::<Dirent>() + dirent.namelen as usize;
                rest = &rest[len.next_multiple_of(8)..];
            }
        }
    }
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

fn with<T: IntoBytes + Immutable>(part: T, name: &str) -> Vec<u8> {
    [part.as_bytes(), &text(name)].concat()
}

#[test]
fn a_file_is_made_written_read_and_removed() {
    let guest = Guest::new();
    let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
    let create = CreateIn { flags, mode: libc::S_IFREG | 0o640, ..CreateIn::default() };
    let body = guest.ask(opcode::CREATE, ROOT, &with(create, "file")).unwrap();
    let (entry, rest) = EntryOut::read_from_prefix(&body).unwrap();
    let handle = OpenOut::read_from_bytes(rest).unwrap().handle;
    assert_eq!(entry.attr.mode, libc::S_IFREG | 0o640);

    let write = WriteIn { handle, offset: 3, size: 4, ..WriteIn::default() };
    let body = [write.as_bytes(), b"data"].concat();
    assert_eq!(guest.get::<WriteOut>(opcode::WRITE, entry.node, &body).unwrap().size, 4);
    let read = ReadIn { handle, offset: 1, size: 100, ..ReadIn::default() };
    assert_eq!(guest.ask(opcode::READ, entry.node, read.as_bytes()).unwrap(), b"\0\0data");
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"\0\0\0data");

    guest.ask(opcode::UNLINK, ROOT, &text("file")).unwrap();
    assert_eq!(guest.lookup(ROOT, "file").unwrap_err(), libc::ENOENT);
    // A removed file is there for as long as it is open.
    assert_eq!(guest.ask(opcode::READ, entry.node, read.as_bytes()).unwrap(), b"\0\0data");
    let release = ReleaseIn { handle, ..ReleaseIn::default() };
    guest.ask(opcode::RELEASE, entry.node, release.as_bytes()).unwrap();
    assert_eq!(guest.ask(opcode::READ, entry.node, read.as_bytes()).unwrap_err(), libc::EBADF);
}

#[test]
fn what_a_guest_remembers_of_a_file_holds_until_it_changes() {
    let guest = Guest::new();
    let name = guest.path("file");
    fs::write(&name, "one").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    let may_keep = || {
        let opened = guest.get::<OpenOut>(opcode::OPEN, node, OpenIn::default().as_bytes()).unwrap();
        opened.open_flags & opened::KEEP_CACHE != 0
    };
    let settle = || std::thread::sleep(std::time::Duration::from_millis(150));

    // A file that was written a moment ago might be written again within the
    // same tick.
    assert!(!may_keep());
    assert!(!may_keep());
    settle();
    assert!(!may_keep());
    assert!(may_keep());
    assert!(may_keep());
    // Now another content of the same size, with its time set back.
    let before = fs::metadata(&name).unwrap().modified().unwrap();
    fs::write(&name, "two").unwrap();
    fs::File::options().write(true).open(&name).unwrap().set_modified(before).unwrap();
    settle();
    assert!(!may_keep());
    assert!(may_keep());
}

#[test]
fn a_write_appends_if_it_says_so_and_only_then() {
    let guest = Guest::new();
    let path = guest.path("file");
    fs::write(&path, "0123").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    let write = |handle: u64, offset: u64, flags: i32, data: &str| {
        let write =
            WriteIn { handle, offset, size: data.len() as u32, flags: flags as u32, ..WriteIn::default() };
        guest.get::<WriteOut>(opcode::WRITE, node, &[write.as_bytes(), data.as_bytes()].concat())
    };
    let appending = libc::O_RDWR | libc::O_APPEND;
    let handle = guest.open(node, appending).unwrap();
    // The guest does not know of data that the host has appended meanwhile.
    fs::write(&path, "012345").unwrap();
    assert_eq!(write(handle, 4, appending, "end").unwrap().size, 3);
    assert_eq!(fs::read_to_string(&path).unwrap(), "012345end");
    // A write of a mapped page, or of a program that has cleared the flag
    // since.
    write(handle, 1, 0, "x").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "0x2345end");
    // A write of a program that has set the flag since.
    let handle = guest.open(node, libc::O_WRONLY).unwrap();
    write(handle, 0, libc::O_WRONLY | libc::O_APPEND, "!").unwrap();
    write(handle, 0, libc::O_WRONLY, "y").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "yx2345end!");

    let flags = (libc::O_CREAT | appending) as u32;
    let create = CreateIn { flags, mode: libc::S_IFREG | 0o600, ..CreateIn::default() };
    let body = guest.ask(opcode::CREATE, ROOT, &with(create, "new")).unwrap();
    let (_, opened) = EntryOut::read_from_prefix(&body).unwrap();
    let handle = OpenOut::read_from_bytes(opened).unwrap().handle;
    write(handle, 0, appending, "ab").unwrap();
    write(handle, 0, 0, "c").unwrap();
    assert_eq!(fs::read_to_string(guest.path("new")).unwrap(), "cb");
}

#[test]
fn a_file_that_can_only_be_appended_to_is_opened_for_that() {
    use rustix::fs::{IFlags, ioctl_setflags};
    let guest = Guest::new();
    fs::write(guest.path("log"), "one").unwrap();
    let file = fs::File::open(guest.path("log")).unwrap();
    if ioctl_setflags(&file, IFlags::APPEND).is_err() {
        return; // the file system of /tmp has no such files, or this user may not make them
    }
    let node = guest.lookup(ROOT, "log").unwrap().node;
    let refused = guest.open(node, libc::O_WRONLY);
    let flags = libc::O_WRONLY | libc::O_APPEND;
    let written = guest.open(node, flags).and_then(|handle| {
        let write = WriteIn { handle, size: 3, flags: flags as u32, ..WriteIn::default() };
        guest.ask(opcode::WRITE, node, &[write.as_bytes(), b"two"].concat())
    });
    ioctl_setflags(&file, IFlags::empty()).unwrap();
    assert_eq!(refused.unwrap_err(), libc::EPERM);
    written.unwrap();
    assert_eq!(fs::read_to_string(guest.path("log")).unwrap(), "onetwo");
}

#[test]
fn only_what_may_be_written_is_flushed_when_it_is_closed() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    for (flags, quiet) in [(libc::O_RDONLY, true), (libc::O_WRONLY, false), (libc::O_RDWR, false)] {
        let open = OpenIn { flags: flags as u32, open_flags: 0 };
        let opened = guest.get::<OpenOut>(opcode::OPEN, node, open.as_bytes()).unwrap();
        assert_eq!(opened.open_flags & opened::NOFLUSH != 0, quiet, "{flags}");
    }
}

#[test]
fn links_are_shown_and_never_followed() {
    let guest = Guest::new();
    symlink("/etc/passwd", guest.path("link")).unwrap();
    symlink("/etc", guest.path("folder")).unwrap();
    let link = guest.lookup(ROOT, "link").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(guest.ask(opcode::READLINK, link.node, b"").unwrap(), b"/etc/passwd");
    assert_eq!(guest.open(link.node, libc::O_RDONLY).unwrap_err(), libc::EINVAL);
    let folder = guest.lookup(ROOT, "folder").unwrap();
    assert_eq!(guest.lookup(folder.node, "passwd").unwrap_err(), libc::ENOTDIR);
    let open = OpenIn::default();
    assert!(guest.ask(opcode::OPENDIR, folder.node, open.as_bytes()).is_err());
    for name in ["..", ".", "../etc", "/etc", "link/../..", ""] {
        assert_eq!(guest.lookup(ROOT, name).unwrap_err(), libc::EINVAL, "{name}");
    }
    // Creating through a link neither follows nor replaces it.
    let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
    let create = CreateIn { flags, mode: libc::S_IFREG | 0o600, ..CreateIn::default() };
    assert_eq!(guest.ask(opcode::CREATE, ROOT, &with(create, "link")).unwrap_err(), libc::EINVAL);
    // A hard link to a symbolic link is a symbolic link.
    guest.ask(opcode::LINK, ROOT, &with(LinkIn { node: link.node }, "second")).unwrap();
    assert_eq!(fs::read_link(guest.path("second")).unwrap(), Path::new("/etc/passwd"));
}

#[test]
fn what_is_no_file_is_not_opened_here() {
    let guest = Guest::new();
    let mknod = MknodIn { mode: libc::S_IFIFO | 0o600, ..MknodIn::default() };
    let pipe: EntryOut = guest.get(opcode::MKNOD, ROOT, &with(mknod, "pipe")).unwrap();
    assert_eq!(pipe.attr.mode, libc::S_IFIFO | 0o600);
    assert_eq!(guest.open(pipe.node, libc::O_RDONLY).unwrap_err(), libc::EINVAL);
    let flags = (libc::O_WRONLY | libc::O_CREAT) as u32;
    let create = CreateIn { flags, mode: libc::S_IFREG | 0o600, ..CreateIn::default() };
    assert_eq!(guest.ask(opcode::CREATE, ROOT, &with(create, "pipe")).unwrap_err(), libc::EINVAL);
}

#[test]
fn names_of_one_file_are_one_node_until_all_are_forgotten() {
    let guest = Guest::new();
    fs::write(guest.path("one"), "x").unwrap();
    fs::hard_link(guest.path("one"), guest.path("two")).unwrap();
    let one = guest.lookup(ROOT, "one").unwrap();
    assert_eq!(guest.lookup(ROOT, "two").unwrap().node, one.node);
    assert_eq!(one.attr.nlink, 2);
    guest.forget(one.node, 1);
    assert!(guest.ask(opcode::GETATTR, one.node, &[0; 16]).is_ok());
    guest.forget(one.node, 1);
    assert_eq!(guest.ask(opcode::GETATTR, one.node, &[0; 16]).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.files.nodes.len(), 0);
    // Forgetting more lookups than there were, and a node that never was, is
    // harmless.
    guest.forget(one.node, u64::MAX);
    guest.forget(ROOT, u64::MAX);
    assert!(guest.lookup(ROOT, "one").unwrap().node > one.node);
}

#[test]
fn a_guest_that_knows_too_much_is_told_so() {
    let guest = Guest::with_open_files(96);
    for number in 0..20 {
        fs::write(guest.path(&number.to_string()), "").unwrap();
    }
    let known: Vec<_> = (0..20).map(|number| guest.lookup(ROOT, &number.to_string())).collect();
    assert_eq!(known.iter().filter(|entry| entry.is_ok()).count(), 8);
    assert!(known.iter().all(|entry| entry.as_ref().err().is_none_or(|errno| *errno == libc::ENFILE)));
    let opened: Vec<_> = (0..30).map(|_| guest.open(known[0].unwrap().node, libc::O_RDONLY)).collect();
    assert_eq!(opened.iter().filter(|handle| handle.is_ok()).count(), 24);
    guest.forget(known[1].unwrap().node, 1);
    assert!(guest.lookup(ROOT, "19").is_ok());
}

#[test]
fn a_large_directory_is_listed_whole_in_small_pieces() {
    let guest = Guest::new();
    let mut expected: Vec<String> = (0..500).map(|number| format!("file-{number:03}")).collect();
    for name in &expected {
        fs::write(guest.path(name), "").unwrap();
    }
    expected.extend([".".into(), "..".into()]);
    expected.sort();
    for (opcode, size) in [(opcode::READDIR, 300), (opcode::READDIRPLUS, 4096), (opcode::READDIR, u32::MAX)] {
        let mut names = guest.list(ROOT, opcode, size);
        names.sort();
        assert!(names == expected, "{opcode} {size}: {}", names.len());
    }
    assert_eq!(guest.files.nodes.len(), 500);
}

#[test]
fn attributes_change_one_by_one() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "12345").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    let set = |change: SetattrIn| {
        guest.get::<AttrOut>(opcode::SETATTR, node, change.as_bytes()).map(|answer| answer.attr)
    };
    let attr = set(SetattrIn { valid: setattr::MODE, mode: 0o4711, ..SetattrIn::default() }).unwrap();
    assert_eq!((attr.mode & 0o7777, attr.size), (0o4711, 5));
    let attr = set(SetattrIn { valid: setattr::SIZE, size: 2, ..SetattrIn::default() }).unwrap();
    assert_eq!((attr.mode & 0o7777, attr.size), (0o4711, 2));
    let valid = setattr::ATIME | setattr::MTIME;
    let attr = set(SetattrIn { valid, atime: 1, mtime: 2, mtime_nsec: 3, ..SetattrIn::default() }).unwrap();
    assert_eq!((attr.atime, attr.mtime, attr.mtime_nsec), (1, 2, 3));
    assert_eq!(fs::metadata(guest.path("file")).unwrap().mtime(), 2);
    let valid = setattr::ATIME | setattr::ATIME_NOW;
    let attr = set(SetattrIn { valid, ..SetattrIn::default() }).unwrap();
    assert!(attr.atime > 1_000_000_000 && attr.mtime == 2);
}

#[test]
fn names_move_and_links_count() {
    let guest = Guest::new();
    fs::write(guest.path("a"), "a").unwrap();
    fs::write(guest.path("b"), "b").unwrap();
    let mkdir = MkdirIn { mode: 0o755, umask: 0 };
    let folder: EntryOut = guest.get(opcode::MKDIR, ROOT, &with(mkdir, "folder")).unwrap();
    let rename = |flags: u32, to: u64, names: &str| {
        let rename = Rename2In { new_parent: to, flags, padding: 0 };
        guest.ask(opcode::RENAME2, ROOT, &with(rename, names)).map(drop)
    };
    assert_eq!(rename(libc::RENAME_NOREPLACE, ROOT, "a\0b").unwrap_err(), libc::EEXIST);
    rename(libc::RENAME_EXCHANGE, ROOT, "a\0b").unwrap();
    assert_eq!(fs::read_to_string(guest.path("a")).unwrap(), "b");
    rename(0, folder.node, "a\0inside").unwrap();
    assert_eq!(fs::read_to_string(guest.path("folder/inside")).unwrap(), "b");
    assert_eq!(guest.ask(opcode::RMDIR, ROOT, &text("folder")).unwrap_err(), libc::ENOTEMPTY);
    guest.ask(opcode::UNLINK, folder.node, &text("inside")).unwrap();
    guest.ask(opcode::RMDIR, ROOT, &text("folder")).unwrap();
    assert_eq!(guest.lookup(ROOT, "folder").unwrap_err(), libc::ENOENT);
}

/// Directories of the test, each in a mount of its own; `None` for a user who
/// may not mount.
fn mounted(guest: &Guest, count: usize) -> Option<Vec<u64>> {
    use rustix::mount::{OpenTreeFlags, open_tree};
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = |_| open_tree(rustix::fs::CWD, guest.folder.path(), flags).ok();
    let mounts: Option<Vec<_>> = (0..count).map(mount).collect();
    mounts.map(|mounts| mounts.into_iter().map(|fd| guest.files.nodes.meet(fd, true).unwrap().0.id).collect())
}

#[test]
fn a_file_gets_names_in_every_mount_that_it_was_found_in() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "").unwrap();
    let Some(folders) = mounted(&guest, 3) else { return };
    let found = |folder: &u64| guest.lookup(*folder, "file").unwrap().node;
    let node = found(&folders[0]);
    let link =
        |folder: u64, name: &str| guest.ask(opcode::LINK, folder, &with(LinkIn { node }, name)).map(drop);
    assert_eq!(link(folders[1], "early").unwrap_err(), libc::EXDEV, "nobody has found it there");
    // However often it is found, it keeps one descriptor per mount.
    assert!(folders.iter().chain(&folders).all(|folder| found(folder) == node));
    assert_eq!(guest.files.nodes.spares(), 2);
    for (number, folder) in folders.iter().enumerate() {
        link(*folder, &format!("name-{number}")).unwrap();
    }
    assert_eq!(fs::metadata(guest.path("file")).unwrap().nlink(), 4);
    guest.forget(node, u64::MAX);
    assert_eq!(guest.files.nodes.spares(), 0);
}

#[test]
fn files_that_are_found_twice_leave_room_for_others() {
    let guest = Guest::with_open_files(128);
    let names: Vec<_> = (0..40).map(|number| number.to_string()).collect();
    for name in &names {
        fs::write(guest.path(name), "").unwrap();
    }
    let Some(folders) = mounted(&guest, 2) else { return };
    let known = |folder: u64| names.iter().filter(|name| guest.lookup(folder, name).is_ok()).count();
    // There are 32 descriptors for names: two are the directories', and few are
    // spares.
    assert_eq!(known(folders[0]), 30);
    assert_eq!(known(folders[1]), 30);
    assert_eq!(guest.files.nodes.spares(), 4);
}

#[test]
fn extended_attributes_are_the_users_own() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    let set = |name: &str| {
        let body = [&with(SetxattrIn { size: 5, flags: 0 }, name)[..], b"value"].concat();
        guest.ask(opcode::SETXATTR, node, &body).map(drop)
    };
    if set("user.colour") == Err(libc::EOPNOTSUPP) {
        return; // the file system of /tmp has none
    }
    for name in ["security.selinux", "trusted.overlay.opaque", "system.posix_acl_access"] {
        assert_eq!(set(name).unwrap_err(), libc::EOPNOTSUPP, "{name}");
    }
    let get =
        |size: u32| guest.ask(opcode::GETXATTR, node, &with(GetxattrIn { size, padding: 0 }, "user.colour"));
    assert_eq!(get(100).unwrap(), b"value");
    assert_eq!(get(0).unwrap(), [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(get(4).unwrap_err(), libc::ERANGE);
    let list = guest.ask(opcode::LISTXATTR, node, GetxattrIn { size: 1000, padding: 0 }.as_bytes()).unwrap();
    assert_eq!(list, b"user.colour\0");
    guest.ask(opcode::REMOVEXATTR, node, &text("user.colour")).unwrap();
    assert_eq!(get(100).unwrap_err(), libc::ENODATA);
}

#[test]
fn a_new_session_knows_nothing_of_the_one_before() {
    let guest = Guest::new();
    fs::write(guest.path("file"), "").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    let answer = init(&guest, InitIn { max_readahead: 1 << 20, flags: u32::MAX, ..INIT }, Some(0)).unwrap();
    assert_eq!((answer.major, answer.max_write, answer.max_readahead), (7, 128 << 10, 128 << 10));
    assert_eq!(guest.ask(opcode::GETATTR, node, &[0; 16]).unwrap_err(), libc::ESTALE);
    let read = ReadIn { handle, size: 1, ..ReadIn::default() };
    assert_eq!(guest.ask(opcode::READ, node, read.as_bytes()).unwrap_err(), libc::EBADF);
}

const INIT: InitIn = InitIn { major: 7, minor: 41, max_readahead: 0, flags: 0 };

fn init(guest: &Guest, init: InitIn, flags2: Option<u32>) -> Result<InitOut, i32> {
    let more = flags2.map(|flags2| InitMoreIn { flags2, unused: [0; 11] });
    let more = more.as_ref().map(IntoBytes::as_bytes).unwrap_or_default();
    guest.get(opcode::INIT, 0, &[init.as_bytes(), more].concat())
}

#[test]
fn mapped_ids_are_for_guests_that_know_them() {
    let guest = Guest::new();
    let flags = init::INIT_EXT;
    let agreed = |flags, flags2| {
        let answer = init(&guest, InitIn { flags, ..INIT }, flags2).unwrap();
        (answer.flags, answer.flags2)
    };
    assert_eq!(agreed(flags, Some(u32::MAX)), (flags, init2::ALLOW_IDMAP));
    assert_eq!(agreed(flags, Some(0)), (flags, 0));
    // A kernel before 5.17 has no second word, whatever the bytes in its place
    // are.
    assert_eq!(agreed(0, Some(u32::MAX)), (0, 0));
    assert_eq!(agreed(0, None), (0, 0));
    assert_eq!(init(&guest, InitIn { flags, ..INIT }, None).unwrap_err(), libc::EINVAL);
}

#[test]
fn a_file_is_not_truncated_before_the_guest_has_checked_that() {
    let everything = init(&Guest::new(), InitIn { flags: u32::MAX, ..INIT }, Some(u32::MAX)).unwrap();
    assert_ne!(everything.flags, 0);
    assert_eq!(everything.flags & init::ATOMIC_O_TRUNC, 0);
}

proptest! {
    #[test]
    fn no_request_is_too_strange(
        opcode in 0..60_u32,
        node in prop_oneof![Just(ROOT), 0..5_u64, any::<u64>()],
        body in prop::collection::vec(any::<u8>(), 0..120),
        cut in any::<prop::sample::Index>(),
    ) {
        let guest = Guest::new();
        fs::write(guest.path("file"), "").unwrap();
        guest.lookup(ROOT, "file").unwrap();
        let header = InHeader { opcode, node, ..InHeader::default() };
        let packet = [header.as_bytes(), &body].concat();
        let mut buffer = Vec::new();
        let _ = guest.files.answer(&packet, &mut buffer);
        let _ = guest.files.answer(&packet[..cut.index(packet.len())], &mut buffer);
    }
}
