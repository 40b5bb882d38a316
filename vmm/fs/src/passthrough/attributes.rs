//! Attributes of files, link targets, and the size of file systems.

use rustix::fs::{AtFlags, CWD, Gid, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};

use super::nodes::{Node, path, stat};
use super::{Passthrough, VALID};
use crate::Errno;
use crate::abi::{AttrOut, SetattrIn, StatfsOut, setattr};
use crate::identity::killing_set_id;
use crate::message::{Answer, Request};
use crate::policy::check_mode;

impl Passthrough {
    pub(super) fn getattr(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let node = self.nodes.get(request.header.node)?;
        let stat = stat(&node.fd())?;
        answer.put(&attr_out(&node, &stat));
        Ok(())
    }

    pub(super) fn setattr(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let change: SetattrIn = request.take()?;
        let node = self.nodes.get(request.header.node)?;
        let fd = node.fd();
        let asked = |bit: u32| change.valid & bit != 0;

        let trusted = node.is_trusted();
        if asked(setattr::MODE) {
            if !trusted {
                check_mode(change.mode, stat(&fd)?.stx_mode.into(), node.kind, trusted)?;
            }
            rustix::fs::chmodat(CWD, path(&fd), super::names::mode(change.mode), AtFlags::empty())?;
        }
        if asked(setattr::UID | setattr::GID) {
            let uid = asked(setattr::UID).then_some(change.uid);
            let gid = asked(setattr::GID).then_some(change.gid);
            self.policy.check_owner(uid, gid)?;
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            rustix::fs::chownat(&fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if asked(setattr::SIZE) {
            killing_set_id(asked(setattr::KILL_SUIDGID) || !trusted, || {
                if asked(setattr::HANDLE) {
                    rustix::fs::ftruncate(&self.handles.get(change.handle)?.file, change.size)
                } else {
                    let file = super::files::open_node(&node, OFlags::WRONLY | OFlags::CLOEXEC)?;
                    rustix::fs::ftruncate(&file, change.size)
                }
            })?;
        }
        if asked(setattr::ATIME | setattr::MTIME) {
            let time = |set: u32, now: u32, seconds: u64, nanos: u32| Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: match (asked(set), asked(now)) {
                    (false, _) => UTIME_OMIT,
                    (true, true) => UTIME_NOW,
                    (true, false) => nanos.into(),
                },
            };
            let times = Timestamps {
                last_access: time(setattr::ATIME, setattr::ATIME_NOW, change.atime, change.atime_nsec),
                last_modification: time(setattr::MTIME, setattr::MTIME_NOW, change.mtime, change.mtime_nsec),
            };
            rustix::fs::utimensat(CWD, path(&fd), &times, AtFlags::empty())?;
        }
        let stat = stat(&fd)?;
        answer.put(&attr_out(&node, &stat));
        Ok(())
    }

    pub(super) fn readlink(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let fd = self.nodes.get(request.header.node)?.fd();
        let target = rustix::fs::readlinkat(&fd, c"", Vec::new())?;
        answer.put_bytes(target.as_bytes());
        Ok(())
    }

    pub(super) fn statfs(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let stat = rustix::fs::fstatvfs(self.nodes.get(request.header.node)?.fd())?;
        answer.put(&StatfsOut {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: stat.f_bsize as u32,
            namelen: stat.f_namemax as u32,
            frsize: stat.f_frsize as u32,
            ..StatfsOut::default()
        });
        Ok(())
    }
}

fn attr_out(node: &Node, stat: &Statx) -> AttrOut {
    AttrOut { valid: VALID, attr: node.attr(stat), ..AttrOut::default() }
}
