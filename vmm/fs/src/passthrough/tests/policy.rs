//! Requests of a hostile guest's kernel that the policy refuses.

use std::os::unix::fs::PermissionsExt;

use super::*;

/// Volumes by their names: those that begin with `t` are trusted.
fn volumes(policy: Policy) -> (Guest, u64, u64) {
    let guest = Guest::with_policy(1024, Policy { trusted: Some("t".into()), ..policy });
    for volume in ["v0", "t1"] {
        fs::create_dir(guest.path(volume)).unwrap();
    }
    let (plain, trusted) = (guest.lookup(ROOT, "v0").unwrap().node, guest.lookup(ROOT, "t1").unwrap().node);
    (guest, plain, trusted)
}

fn create(guest: &Guest, asker: (u32, u32), parent: u64, name: &str, mode: u32) -> Result<EntryOut, i32> {
    let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
    let create = CreateIn { flags, mode: libc::S_IFREG | mode, ..CreateIn::default() };
    let body = guest.ask_as(asker, opcode::CREATE, parent, &with(create, name))?;
    Ok(EntryOut::read_from_prefix(&body).unwrap().0)
}

fn mknod(guest: &Guest, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<(), i32> {
    let mknod = MknodIn { mode, rdev, ..MknodIn::default() };
    guest.ask(opcode::MKNOD, parent, &with(mknod, name)).map(drop)
}

fn set_mode(guest: &Guest, node: u64, mode: u32) -> Result<u32, i32> {
    let change = SetattrIn { valid: setattr::MODE, mode, ..SetattrIn::default() };
    guest.get::<AttrOut>(opcode::SETATTR, node, change.as_bytes()).map(|answer| answer.attr.mode & 0o7777)
}

fn set_owner(guest: &Guest, node: u64, uid: u32, gid: u32) -> Result<AttrOut, i32> {
    let change = SetattrIn { valid: setattr::UID | setattr::GID, uid, gid, ..SetattrIn::default() };
    guest.get(opcode::SETATTR, node, change.as_bytes())
}

#[test]
fn a_volume_that_is_not_trusted_gets_no_program_with_powers() {
    let (guest, plain, trusted) = volumes(Policy::default());
    for mode in [0o4755, 0o2755, 0o6755] {
        assert_eq!(create(&guest, (0, 0), plain, "program", mode).unwrap_err(), libc::EPERM);
        assert_eq!(mknod(&guest, plain, "program", libc::S_IFREG | mode, 0).unwrap_err(), libc::EPERM);
    }
    let file = create(&guest, (0, 0), plain, "file", 0o755).unwrap().node;
    assert_eq!(set_mode(&guest, file, 0o4755).unwrap_err(), libc::EPERM);
    assert_eq!(set_mode(&guest, file, 0o2755).unwrap_err(), libc::EPERM);
    // A sticky bit gives no power, nor does a group that a directory passes on.
    assert_eq!(set_mode(&guest, file, 0o1700), Ok(0o1700));
    let mkdir = MkdirIn { mode: 0o755, umask: 0 };
    let folder = guest.get::<EntryOut>(opcode::MKDIR, plain, &with(mkdir, "folder")).unwrap().node;
    assert_eq!(set_mode(&guest, folder, 0o2775), Ok(0o2775));

    // A file may keep the bits that the host gave it, but loses them when it is
    // written to.
    fs::set_permissions(guest.path("v0/file"), fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(set_mode(&guest, file, 0o4711), Ok(0o4711));
    let handle = guest.open(file, libc::O_RDWR).unwrap();
    let write = WriteIn { handle, size: 1, ..WriteIn::default() };
    guest.ask(opcode::WRITE, file, &[write.as_bytes(), b"x"].concat()).unwrap();
    assert_eq!(fs::metadata(guest.path("v0/file")).unwrap().mode() & 0o7777, 0o711);

    assert!(create(&guest, (0, 0), trusted, "program", 0o4755).is_ok());
    let file = guest.lookup(trusted, "program").unwrap().node;
    assert_eq!(set_mode(&guest, file, 0o6755), Ok(0o6755));
}

#[test]
fn file_capabilities_are_for_trusted_volumes() {
    let (guest, plain, trusted) = volumes(Policy::default());
    // CAP_NET_RAW, permitted and effective (`struct vfs_cap_data`, revision 2).
    let mut value = [0u8; 20];
    value[..4].copy_from_slice(&0x0200_0001u32.to_le_bytes());
    value[4..8].copy_from_slice(&(1u32 << 13).to_le_bytes());
    let set = |node: u64| {
        let set = SetxattrIn { size: value.len() as u32, flags: 0 };
        guest.ask(opcode::SETXATTR, node, &[with(set, "security.capability"), value.to_vec()].concat())
    };
    let node = |parent| create(&guest, (0, 0), parent, "program", 0o755).unwrap().node;
    assert_eq!(set(node(plain)).unwrap_err(), libc::EPERM);
    assert!(set(node(trusted)).is_ok());
}

#[test]
fn devices_are_for_trusted_volumes_of_pods_without_a_user_namespace() {
    let (guest, plain, trusted) = volumes(Policy::default());
    let disk = 0x800;
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        assert_eq!(mknod(&guest, plain, "device", kind | 0o666, disk).unwrap_err(), libc::EPERM);
    }
    // The device by which overlayfs marks a deleted file.
    assert_eq!(mknod(&guest, plain, "deleted", libc::S_IFCHR, 0), Ok(()));
    assert_eq!(mknod(&guest, plain, "pipe", libc::S_IFIFO | 0o600, 0), Ok(()));
    assert_eq!(mknod(&guest, trusted, "device", libc::S_IFBLK | 0o600, disk), Ok(()));

    let own = Policy { uids: vec!["0:65536".parse().unwrap()], ..Policy::default() };
    let (guest, _, trusted) = volumes(own);
    assert_eq!(mknod(&guest, trusted, "device", libc::S_IFBLK | 0o600, disk).unwrap_err(), libc::EPERM);
}

#[test]
fn a_pod_with_a_user_namespace_has_no_ids_but_its_own() {
    let range = vec!["0:1000".parse().unwrap(), "100000:1000".parse().unwrap()];
    let (guest, plain, _) = volumes(Policy { uids: range.clone(), gids: range, ..Policy::default() });
    let (inside, outside) = ([0, 999, 100_000, 100_999], [1000, 99_999, 101_000, u32::MAX]);
    for id in inside {
        let entry = create(&guest, (id, id), plain, &format!("file-{id}"), 0o644).unwrap();
        assert_eq!((entry.attr.uid, entry.attr.gid), (id, id));
    }
    let node = guest.lookup(plain, "file-0").unwrap().node;
    for id in outside {
        for asker in [(id, 0), (0, id)] {
            assert_eq!(create(&guest, asker, plain, "file", 0o644).unwrap_err(), libc::EPERM);
            let mkdir = with(MkdirIn { mode: 0o755, umask: 0 }, "folder");
            assert_eq!(guest.ask_as(asker, opcode::MKDIR, plain, &mkdir).unwrap_err(), libc::EPERM);
            let link = [text("link"), text("target")].concat();
            assert_eq!(guest.ask_as(asker, opcode::SYMLINK, plain, &link).unwrap_err(), libc::EPERM);
            assert_eq!(set_owner(&guest, node, asker.0, asker.1).unwrap_err(), libc::EPERM);
        }
    }
    assert_eq!(set_owner(&guest, node, 100_007, 7).map(|answer| answer.attr.uid), Ok(100_007));
}

#[test]
fn a_file_of_a_trusted_volume_is_one_wherever_it_is_found() {
    let (guest, plain, trusted) = volumes(Policy::default());
    fs::write(guest.path("v0/file"), "").unwrap();
    fs::hard_link(guest.path("v0/file"), guest.path("t1/file")).unwrap();
    let node = guest.lookup(plain, "file").unwrap().node;
    assert_eq!(set_mode(&guest, node, 0o4755).unwrap_err(), libc::EPERM);
    assert_eq!(guest.lookup(trusted, "file").unwrap().node, node);
    assert_eq!(set_mode(&guest, node, 0o4755), Ok(0o4755));
}
