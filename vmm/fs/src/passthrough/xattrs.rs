//! Extended attributes: the users' own, and the capabilities of programs.
//!
//! Labels of the host's security modules belong to the host, and nobody would
//! check ACLs, so the guest is told that there are none.

use std::ffi::CStr;

use rustix::fs::XattrFlags;

use super::nodes::path;
use super::{MAX_DATA, Passthrough};
use crate::Errno;
use crate::abi::{GetxattrIn, GetxattrOut, SetxattrIn};
use crate::message::{Answer, Request};

/// Most bytes of a list or value (`XATTR_SIZE_MAX`).
const MAX_SIZE: usize = 64 << 10;

/// The attribute with the capabilities of a program.
const CAPABILITY: &CStr = c"security.capability";

fn is_served(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == CAPABILITY.to_bytes()
}

fn check(name: &CStr) -> Result<(), Errno> {
    if is_served(name.to_bytes()) { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}

impl Passthrough {
    pub(super) fn getxattr(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let get: GetxattrIn = request.take()?;
        let name = request.text()?;
        check(name)?;
        let fd = self.nodes.get(request.header.node)?.fd();
        if get.size == 0 {
            let size = rustix::fs::getxattr_query(path(&fd), name)? as u32;
            answer.put(&GetxattrOut { size, padding: 0 });
            return Ok(());
        }
        answer.fill(get.size.min(MAX_DATA) as usize, |value| rustix::fs::getxattr(path(&fd), name, value))
    }

    pub(super) fn setxattr(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let set: SetxattrIn = request.take()?;
        let name = request.text()?;
        let value = request.bytes(set.size as usize)?;
        check(name)?;
        let node = self.nodes.get(request.header.node)?;
        if name == CAPABILITY && !node.is_trusted() {
            return Err(Errno::PERM);
        }
        let fd = node.fd();
        rustix::fs::setxattr(path(&fd), name, value, XattrFlags::from_bits_retain(set.flags))
    }

    pub(super) fn listxattr(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let get: GetxattrIn = request.take()?;
        let fd = self.nodes.get(request.header.node)?.fd();
        let mut all = vec![0; MAX_SIZE];
        let len = rustix::fs::listxattr(path(&fd), &mut all)?;
        let names = all.get(..len).unwrap_or_default();
        let list: Vec<u8> = names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| is_served(name.strip_suffix(b"\0").unwrap_or(name)))
            .flatten()
            .copied()
            .collect();
        if get.size == 0 {
            answer.put(&GetxattrOut { size: list.len() as u32, padding: 0 });
        } else if list.len() > get.size as usize {
            return Err(Errno::RANGE);
        } else {
            answer.put_bytes(&list);
        }
        Ok(())
    }

    pub(super) fn removexattr(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let name = request.text()?;
        check(name)?;
        let fd = self.nodes.get(request.header.node)?.fd();
        rustix::fs::removexattr(path(&fd), name)
    }
}
