//! Names: finding, making, linking, moving and removing files.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Statx};

use super::nodes::{Node, path};
use super::{Passthrough, VALID};
use crate::Errno;
use crate::abi::{self, CreateIn, EntryOut, LinkIn, MkdirIn, MknodIn, OpenOut, ROOT, Rename2In, RenameIn};
use crate::identity::{as_user, killing_set_id};
use crate::message::{Answer, Request};
use crate::policy::check_mode;

impl Passthrough {
    /// Finds `name` in a directory, without following links.
    pub(super) fn find(&self, parent: &Node, name: &CStr) -> Result<(Arc<Node>, Statx), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent.fd(), name, flags, Mode::empty())?;
        let trusted = if parent.id == ROOT { self.policy.trusts(name) } else { parent.is_trusted() };
        self.nodes.meet(file, trusted)
    }

    /// Finds the file that a descriptor has open, in a directory.
    fn find_open(&self, parent: &Node, file: &OwnedFd) -> Result<(Arc<Node>, Statx), Errno> {
        let file = rustix::fs::openat(CWD, path(file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        self.nodes.meet(file, parent.is_trusted())
    }

    /// Runs `act` as the user of the request, who must be one of the pod's.
    fn as_asker<T>(&self, request: &Request<'_>, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let (uid, gid) = (request.header.uid, request.header.gid);
        self.policy.check_owner(Some(uid), Some(gid))?;
        as_user(uid, gid, act)
    }

    pub(super) fn entry(node: &Node, stat: &Statx) -> EntryOut {
        EntryOut {
            node: node.id,
            entry_valid: VALID,
            attr_valid: VALID,
            attr: node.attr(stat),
            ..EntryOut::default()
        }
    }

    fn answer_entry(&self, parent: &Node, name: &CStr, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let (node, stat) = self.find(parent, name)?;
        answer.put(&Self::entry(&node, &stat));
        Ok(())
    }

    pub(super) fn lookup(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let parent = self.nodes.get(request.header.node)?;
        self.answer_entry(&parent, request.name()?, answer)
    }

    pub(super) fn create(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let create: CreateIn = request.take()?;
        let name = request.name()?;
        let parent = self.nodes.get(request.header.node)?;
        let flags = OFlags::from_bits_retain(create.flags);
        let wanted = super::files::open_flags(create.flags);
        check_mode(create.mode, 0, FileType::RegularFile, parent.is_trusted())?;
        let made = self.as_asker(request, || {
            let flags = wanted.difference(OFlags::APPEND) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            rustix::fs::openat(parent.fd(), name, flags, mode(create.mode))
        });
        let (file, (node, stat)) = match made {
            Ok(file) => {
                let found = self.find_open(&parent, &file)?;
                (file, found)
            }
            // The file was made in the meantime, or the guest did not know of
            // it.
            Err(Errno::EXIST) if !flags.contains(OFlags::EXCL) => {
                let found = self.find(&parent, name)?;
                let kill = create.open_flags & abi::open::KILL_SUIDGID != 0 || !found.0.is_trusted();
                match killing_set_id(kill, || super::files::open_node(&found.0, wanted)) {
                    Ok(file) => (file, found),
                    Err(errno) => {
                        self.nodes.forget(found.0.id, 1);
                        return Err(errno);
                    }
                }
            }
            Err(errno) => return Err(errno),
        };
        let handle = match self.handles.add(file, super::files::is_writable(wanted), node.is_trusted()) {
            Ok(handle) => handle,
            Err(errno) => {
                self.nodes.forget(node.id, 1);
                return Err(errno);
            }
        };
        answer.put(&Self::entry(&node, &stat));
        answer.put(&OpenOut { handle, ..OpenOut::default() });
        Ok(())
    }

    pub(super) fn mknod(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let mknod: MknodIn = request.take()?;
        let name = request.name()?;
        let parent = self.nodes.get(request.header.node)?;
        let kind = FileType::from_raw_mode(mknod.mode);
        let device = rustix::fs::makedev(
            (mknod.rdev >> 8) & 0xfff,
            (mknod.rdev & 0xff) | ((mknod.rdev >> 12) & 0xfff00),
        );
        check_mode(mknod.mode, 0, kind, parent.is_trusted())?;
        self.policy.check_kind(kind, device, parent.is_trusted())?;
        self.as_asker(request, || rustix::fs::mknodat(parent.fd(), name, kind, mode(mknod.mode), device))?;
        self.answer_entry(&parent, name, answer)
    }

    pub(super) fn mkdir(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let mkdir: MkdirIn = request.take()?;
        let name = request.name()?;
        let parent = self.nodes.get(request.header.node)?;
        self.as_asker(request, || rustix::fs::mkdirat(parent.fd(), name, mode(mkdir.mode)))?;
        self.answer_entry(&parent, name, answer)
    }

    pub(super) fn symlink(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let name = request.name()?;
        let target = request.text()?;
        let parent = self.nodes.get(request.header.node)?;
        self.as_asker(request, || rustix::fs::symlinkat(target, parent.fd(), name))?;
        self.answer_entry(&parent, name, answer)
    }

    pub(super) fn link(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let link: LinkIn = request.take()?;
        let name = request.name()?;
        let parent = self.nodes.get(request.header.node)?;
        let file = self.nodes.get(link.node)?.fd_beside(&parent);
        // The link that is followed is the one in /proc.
        rustix::fs::linkat(CWD, path(&file), parent.fd(), name, AtFlags::SYMLINK_FOLLOW)?;
        self.answer_entry(&parent, name, answer)
    }

    pub(super) fn unlink(&self, request: &mut Request<'_>, directory: bool) -> Result<(), Errno> {
        let name = request.name()?;
        let parent = self.nodes.get(request.header.node)?;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(parent.fd(), name, flags)
    }

    pub(super) fn rename(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let rename: RenameIn = request.take()?;
        self.move_name(request, rename.new_parent, RenameFlags::empty())
    }

    pub(super) fn rename2(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let rename: Rename2In = request.take()?;
        let flags = RenameFlags::from_bits(rename.flags).ok_or(Errno::INVAL)?;
        self.move_name(request, rename.new_parent, flags)
    }

    fn move_name(&self, request: &mut Request<'_>, to: u64, flags: RenameFlags) -> Result<(), Errno> {
        let (old, new) = (request.name()?, request.name()?);
        let from = self.nodes.get(request.header.node)?.fd();
        let to = self.nodes.get(to)?.fd();
        rustix::fs::renameat_with(&from, old, &to, new, flags)
    }
}

/// Permissions and set-ID bits of a mode.
pub(super) fn mode(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode & 0o7777)
}
