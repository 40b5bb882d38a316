//! Executes each request on the real file system.
//!
//! The process's working directory is `/proc/self/fd`. A file that is known by
//! an `O_PATH` descriptor is opened, or changed, by that number as its path,
//! which the kernel resolves to the very file.

mod attributes;
mod directories;
mod files;
mod handles;
mod names;
mod nodes;
#[cfg(test)]
mod tests;
mod xattrs;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};

use crate::Errno;
use crate::abi::{self, InitIn, InitMoreIn, InitOut, init, init2, opcode};
use crate::message::{Answer, Request};
use crate::policy::Policy;
use handles::Handles;
use nodes::Nodes;

/// Most bytes of data in one request or answer.
pub const MAX_DATA: u32 = 128 << 10;

/// Seconds for which the guest may rely on a name or on attributes without
/// asking again: the host may change them.
const VALID: u64 = 1;

/// The features that the server accepts if a guest offers them. Truncating a
/// file while it is opened is not among them: the guest's kernel would ask for
/// that before it sees that the file is a running program. It truncates with a
/// request of its own instead.
const FEATURES: u32 = init::ASYNC_READ
    | init::BIG_WRITES
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::HANDLE_KILLPRIV_V2
    | init::INIT_EXT;

/// Features of the second word: the guest may show a volume to a container with
/// other ids. It maps them before it asks, and names a user only where a file
/// is made.
const MORE_FEATURES: u32 = init2::ALLOW_IDMAP;

/// A directory tree that is served to a guest.
#[derive(Debug)]
pub struct Passthrough {
    nodes: Nodes,
    handles: Handles,
    policy: Policy,
}

impl Passthrough {
    /// Serves `root` by `policy`, in a process that may have `open_files` open. The
    /// process's working directory must be `/proc/self/fd`.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub fn new(root: &Path, open_files: usize, policy: Policy) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root: OwnedFd = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
        // A quarter is for open files, most of the rest for names that the
        // guest's kernel knows, and a few are for the server itself.
        let handles = open_files / 4;
        Ok(Self {
            nodes: Nodes::new(root, open_files.saturating_sub(handles + 64), policy.trusts_root())?,
            handles: Handles::new(handles),
            policy,
        })
    }

    /// Returns the answer to the request in `packet`; none for a request that
    /// has no answer.
    pub fn answer<'a>(&self, packet: &[u8], buffer: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let mut request = Request::read(packet)?;
        let unique = request.header.unique;
        let mut answer = Answer::new(buffer);
        let result = match request.header.opcode {
            opcode::FORGET => {
                let _ = self.forget(&mut request);
                return None;
            }
            opcode::BATCH_FORGET => {
                let _ = self.batch_forget(&mut request);
                return None;
            }
            opcode::INTERRUPT => return None,
            _ => self.serve(&mut request, &mut answer),
        };
        Some(answer.finish(unique, result))
    }

    fn serve(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        match request.header.opcode {
            opcode::INIT => self.init(request, answer),
            opcode::DESTROY => {
                self.clear();
                Ok(())
            }

            opcode::LOOKUP => self.lookup(request, answer),
            opcode::CREATE => self.create(request, answer),
            opcode::MKNOD => self.mknod(request, answer),
            opcode::MKDIR => self.mkdir(request, answer),
            opcode::SYMLINK => self.symlink(request, answer),
            opcode::LINK => self.link(request, answer),
            opcode::UNLINK => self.unlink(request, false),
            opcode::RMDIR => self.unlink(request, true),
            opcode::RENAME => self.rename(request),
            opcode::RENAME2 => self.rename2(request),

            opcode::GETATTR => self.getattr(request, answer),
            opcode::SETATTR => self.setattr(request, answer),
            opcode::READLINK => self.readlink(request, answer),
            opcode::STATFS => self.statfs(request, answer),
            opcode::GETXATTR => self.getxattr(request, answer),
            opcode::SETXATTR => self.setxattr(request),
            opcode::LISTXATTR => self.listxattr(request, answer),
            opcode::REMOVEXATTR => self.removexattr(request),

            opcode::OPEN => self.open(request, answer),
            opcode::READ => self.read(request, answer),
            opcode::WRITE => self.write(request, answer),
            opcode::FLUSH => self.flush(request),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(request),
            opcode::FALLOCATE => self.fallocate(request),
            opcode::LSEEK => self.lseek(request, answer),
            opcode::COPY_FILE_RANGE => self.copy(request, answer),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request),

            opcode::OPENDIR => self.opendir(request, answer),
            opcode::READDIR => self.readdir(request, answer, false),
            opcode::READDIRPLUS => self.readdir(request, answer, true),

            // The guest's kernel implements the other requests by itself, or
            // does without: file locks, for example, concern the pod's own
            // processes only.
            _ => Err(Errno::NOSYS),
        }
    }

    /// Begins a new session: everything of an earlier one is forgotten.
    fn init(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let theirs: InitIn = request.take()?;
        if theirs.major < abi::MAJOR {
            return Err(Errno::PROTO);
        }
        let more = if theirs.flags & init::INIT_EXT == 0 { 0 } else { request.take::<InitMoreIn>()?.flags2 };
        self.clear();
        answer.put(&InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR,
            max_readahead: theirs.max_readahead.min(MAX_DATA),
            flags: theirs.flags & FEATURES,
            max_background: 64,
            congestion_threshold: 48,
            max_write: MAX_DATA,
            time_gran: 1,
            max_pages: (MAX_DATA / 4096) as u16,
            flags2: more & MORE_FEATURES,
            ..InitOut::default()
        });
        Ok(())
    }

    fn clear(&self) {
        self.handles.clear();
        self.nodes.clear();
    }

    fn forget(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let forget: abi::ForgetIn = request.take()?;
        self.nodes.forget(request.header.node, forget.lookups);
        Ok(())
    }

    fn batch_forget(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let batch: abi::BatchForgetIn = request.take()?;
        for _ in 0..batch.count {
            let one: abi::ForgetOne = request.take()?;
            self.nodes.forget(one.node, one.lookups);
        }
        Ok(())
    }
}
