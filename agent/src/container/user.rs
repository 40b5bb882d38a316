//! The user of a container's process. Names are looked up in the container's own
//! `/etc/passwd` and `/etc/group`, which are as hostile as its image. A number
//! is always an id: a request for 1234 must not become root because an image has
//! a user with that name.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::guest::in_root;

/// Most bytes of a passwd or group file.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// A user could not be found.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The file has no such name.
    #[error("no {what} {name:?} in the container's /etc/{file}")]
    Unknown { what: &'static str, name: String, file: &'static str },
    /// The number is not an id of the kernel.
    #[error("{what} {number} is not an id: those are 0 to {}", u32::MAX - 1)]
    OutOfRange { what: &'static str, number: String },
    /// The file exists but cannot be read.
    #[error("read the container's /{path}: {cause}")]
    Unreadable { path: &'static str, cause: String },
}

/// A process's user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    /// The primary group.
    pub gid: u32,
    /// Supplementary groups in ascending order, including the primary one.
    pub groups: BTreeSet<u32>,
    /// The home directory; "/" for a user that has none.
    pub home: String,
}

/// Looks `request` ("", "user", "uid", "user:group", "uid:gid"...) up in the
/// root filesystem at `rootfs`. The groups that `/etc/group` gives the user
/// are added unless `strict`.
pub fn resolve(rootfs: &Path, request: &str, strict: bool) -> Result<Identity, Error> {
    let root = open(rootfs, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|cause| Error::Unreadable { path: "", cause: cause.to_string() })?;
    let passwd = read_inside(&root, "etc/passwd")?;
    let group = read_inside(&root, "etc/group")?;
    look_up(request, strict, &passwd, &group)
}

/// Reads a file as a process inside `root` would see it: links are followed,
/// but never out of the root. A missing file counts as empty.
fn read_inside(root: &OwnedFd, path: &'static str) -> Result<String, Error> {
    let unreadable = |cause: String| Error::Unreadable { path, cause };
    // O_NONBLOCK: a fifo must not hold up the agent.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = match in_root::open(root, Path::new(path), flags) {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(String::new()),
        Err(cause) => return Err(unreadable(cause.to_string())),
    };
    let metadata = file.metadata().map_err(|cause| unreadable(cause.to_string()))?;
    if !metadata.is_file() {
        return Err(unreadable("not a regular file".to_owned()));
    }
    let mut bytes = Vec::new();
    let read: io::Result<usize> = file.take(MAX_FILE + 1).read_to_end(&mut bytes);
    match read {
        Ok(count) if count as u64 > MAX_FILE => Err(unreadable(format!("larger than {MAX_FILE} bytes"))),
        Ok(_) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(cause) => Err(unreadable(cause.to_string())),
    }
}

/// A line of `/etc/passwd` (passwd(5)).
struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// The well-formed lines; others are skipped, as the C library does.
fn passwd_entries(text: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let _password = fields.next()?;
        let uid = id(fields.next()?)?;
        let gid = id(fields.next()?)?;
        let _comment = fields.next();
        Some(PasswdEntry { name, uid, gid, home: fields.next().unwrap_or_default() })
    })
}

/// A line of `/etc/group` (group(5)).
struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl GroupEntry<'_> {
    fn has(&self, user: &str) -> bool {
        self.members.split(',').any(|member| member.trim() == user)
    }
}

fn group_entries(text: &str) -> impl Iterator<Item = GroupEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let _password = fields.next()?;
        let gid = id(fields.next()?)?;
        Some(GroupEntry { name, gid, members: fields.next().unwrap_or_default() })
    })
}

/// A user or group id. The largest number means "no change" to the kernel.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

/// The id that `text` is; `None` for a name. Digits are never a name, even if
/// they are not a valid id.
fn number(what: &'static str, text: &str) -> Result<Option<u32>, Error> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    let outside = || Error::OutOfRange { what, number: text.to_owned() };
    id(text).map(Some).ok_or_else(outside)
}

fn look_up(request: &str, strict: bool, passwd: &str, group: &str) -> Result<Identity, Error> {
    let (user, primary) = match request.split_once(':') {
        Some((user, primary)) => (user, Some(primary).filter(|primary| !primary.is_empty())),
        None => (request, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let uid = number("user", user)?;

    let entry = passwd_entries(passwd).find(|entry| match uid {
        Some(uid) => entry.uid == uid,
        None => entry.name == user,
    });
    let (uid, own_gid, name, home) = match (entry, uid) {
        (Some(entry), _) => (entry.uid, entry.gid, Some(entry.name), entry.home),
        (None, Some(uid)) => (uid, 0, None, ""),
        (None, None) => return Err(Error::Unknown { what: "user", name: user.to_owned(), file: "passwd" }),
    };
    let gid = match primary {
        None => own_gid,
        Some(primary) => match number("group", primary)? {
            Some(gid) => gid,
            None => group_entries(group)
                .find(|entry| entry.name == primary)
                .map(|entry| entry.gid)
                .ok_or_else(|| Error::Unknown { what: "group", name: primary.to_owned(), file: "group" })?,
        },
    };

    let mut groups = BTreeSet::from([gid]);
    if let Some(name) = name.filter(|_| !strict) {
        groups.extend(group_entries(group).filter(|entry| entry.has(name)).map(|entry| entry.gid));
    }
    let home = if home.is_empty() { "/" } else { home };
    Ok(Identity { uid, gid, groups, home: home.to_owned() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        # comment:x:5:5::/:\n\
        broken line\n\
        www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n\
        1234:x:0:0::/root:\n\
        nohome:x:50:50\n";
    const GROUP: &str = "root:x:0:\n1234:x:0:\nwww-data:x:33:\nssl:x:104:www-data,root\nmail:x:8:www-data\nbad:x:x:www-data\n";

    fn found(request: &str) -> (u32, u32, Vec<u32>, String) {
        let identity = look_up(request, false, PASSWD, GROUP).unwrap();
        (identity.uid, identity.gid, identity.groups.into_iter().collect(), identity.home)
    }

    #[test]
    fn users_and_groups_are_found_by_name_and_number() {
        assert_eq!(found(""), (0, 0, vec![0, 104], "/root".into()));
        assert_eq!(found("www-data"), (33, 33, vec![8, 33, 104], "/var/www".into()));
        assert_eq!(found("33"), found("www-data"));
        assert_eq!(found("www-data:ssl"), (33, 104, vec![8, 104], "/var/www".into()));
        assert_eq!(found("1000:1000"), (1000, 1000, vec![1000], "/".into()));
        assert_eq!(found("nohome"), (50, 50, vec![50], "/".into()));
    }

    #[test]
    fn an_unknown_number_gets_group_zero() {
        assert_eq!(found("4711"), (4711, 0, vec![0], "/".into()));
    }

    #[test]
    fn digits_are_an_id_whatever_names_an_image_has() {
        assert_eq!(found("1234"), (1234, 0, vec![0], "/".into()));
        assert_eq!(found("1234:1234"), (1234, 1234, vec![1234], "/".into()));
        assert_eq!(found("www-data:1234"), (33, 1234, vec![8, 104, 1234], "/var/www".into()));
        assert_eq!(found("+1234"), found("1234"));
    }

    #[test]
    fn strict_groups_leave_the_images_groups_out() {
        let identity = look_up("www-data", true, PASSWD, GROUP).unwrap();
        assert_eq!(identity.groups, BTreeSet::from([33]));
    }

    #[test]
    fn unknown_names_and_illegal_numbers_are_errors() {
        let passwd = format!("{PASSWD}99999999999:x:0:0::/:\n-1:x:0:0::/:\n");
        let error = |request: &str| look_up(request, false, &passwd, GROUP).unwrap_err();
        for request in ["nobody", "-", "0x5"] {
            assert!(matches!(error(request), Error::Unknown { what: "user", .. }), "{request}");
        }
        for request in ["4294967295", "-1", "99999999999"] {
            assert!(matches!(error(request), Error::OutOfRange { what: "user", .. }), "{request}");
        }
        for request in ["root:wheel", "0:x:y"] {
            assert!(matches!(error(request), Error::Unknown { what: "group", .. }), "{request}");
        }
        let error = error("0:4294967295");
        assert!(matches!(error, Error::OutOfRange { what: "group", .. }), "{error}");
    }

    #[test]
    fn links_stay_inside_the_root() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("passwd"), "trap:x:1:1::/:\n").unwrap();
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        symlink(outside.path().join("passwd"), root.path().join("etc/passwd")).unwrap();
        assert!(resolve(root.path(), "trap", false).is_err());

        fs::create_dir(root.path().join("inside")).unwrap();
        fs::write(root.path().join("inside/passwd"), "ok:x:9:9::/:\n").unwrap();
        fs::remove_file(root.path().join("etc/passwd")).unwrap();
        symlink("/../../inside/passwd", root.path().join("etc/passwd")).unwrap();
        assert_eq!(resolve(root.path(), "ok", false).unwrap().uid, 9);
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        nix::unistd::mkfifo(&root.path().join("etc/passwd"), Mode::S_IRWXU).unwrap();
        let error = resolve(root.path(), "0", false).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }

    #[test]
    fn an_image_without_the_files_still_has_numbers() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(resolve(root.path(), "7:8", false).unwrap().gid, 8);
        assert!(resolve(root.path(), "daemon", false).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_survived(request in ".{0,20}", passwd in "(?s).{0,300}", group in "(?s).{0,300}") {
            let _ = look_up(&request, false, &passwd, &group);
        }

        #[test]
        fn a_written_entry_is_found_among_noise(
            name in "[a-z_][a-z0-9_-]{0,15}",
            uid in 0..u32::MAX,
            gid in 0..u32::MAX,
            member_of in 0..u32::MAX,
            noise in prop::collection::vec("[#!:0-9]{0,20}", 0..5),
        ) {
            let passwd = format!("{}\n{name}:x:{uid}:{gid}::/home/{name}:/bin/sh\n", noise.join("\n"));
            let group = format!("{}\nextra:x:{member_of}:other,{name}\n", noise.join("\n"));
            let identity = look_up(&name, false, &passwd, &group).unwrap();
            prop_assert_eq!((identity.uid, identity.gid), (uid, gid));
            prop_assert_eq!(identity.groups, BTreeSet::from([gid, member_of]));
            prop_assert_eq!(identity.home, format!("/home/{name}"));
        }
    }
}
