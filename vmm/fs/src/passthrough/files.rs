//! Open files: reading, writing, and other operations on them.

use std::io::IoSlice;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::ReadWriteFlags;

use super::nodes::{Node, path, stat};
use super::{MAX_DATA, Passthrough};
use crate::Errno;
use crate::abi::{
    self, CopyIn, FallocateIn, FlushIn, FsyncIn, LseekIn, LseekOut, OpenIn, OpenOut, ReadIn, ReleaseIn,
    WriteIn, WriteOut,
};
use crate::identity::killing_set_id;
use crate::message::{Answer, Request};

/// Most bytes that one request copies, so that it ends soon.
const MAX_COPY: u64 = 16 << 20;

/// The flags of open(2) that concern the server. A file that is open for direct
/// I/O in the guest need not be so here.
pub(super) fn open_flags(flags: u32) -> OFlags {
    let ours = OFlags::RWMODE | OFlags::APPEND | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
    (OFlags::from_bits_retain(flags) & ours) | OFlags::CLOEXEC
}

pub(super) const fn is_writable(flags: OFlags) -> bool {
    !flags.intersection(OFlags::RWMODE).is_empty()
}

/// Opens a regular file. Other kinds are opened by the guest alone: here they
/// might be a device, or a pipe that nobody writes to.
///
/// The file is not opened for appending: such a descriptor appends every write,
/// but a guest writes elsewhere too, after `fcntl(2)` or from a mapping of the
/// file. Each write names its offset.
pub(super) fn open_node(node: &Node, flags: OFlags) -> Result<OwnedFd, Errno> {
    if node.kind != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    let open = |flags| rustix::fs::openat(CWD, path(&node.fd()), flags, Mode::empty());
    match open(flags.difference(OFlags::APPEND)) {
        // A file that allows only appending (chattr(1), `+a`) must be opened so.
        Err(Errno::PERM) if flags.contains(OFlags::APPEND) => open(flags),
        opened => opened,
    }
}

impl Passthrough {
    pub(super) fn open(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let open: OpenIn = request.take()?;
        let node = self.nodes.get(request.header.node)?;
        let flags = open_flags(open.flags);
        let kill = open.open_flags & abi::open::KILL_SUIDGID != 0 || !node.is_trusted();
        let file = killing_set_id(kill, || open_node(&node, flags))?;
        let unchanged = node.is_unchanged(&stat(&file)?);
        let handle = self.handles.add(file, is_writable(flags), node.is_trusted())?;
        let keep = if unchanged { abi::opened::KEEP_CACHE } else { 0 };
        // A close of a file that was only read needs no message: there is
        // nothing to flush.
        let quiet = if is_writable(flags) { 0 } else { abi::opened::NOFLUSH };
        let open_flags = keep | quiet;
        answer.put(&OpenOut { handle, open_flags, ..OpenOut::default() });
        Ok(())
    }

    pub(super) fn read(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let read: ReadIn = request.take()?;
        let handle = self.handles.get(read.handle)?;
        let len = read.size.min(MAX_DATA) as usize;
        answer.fill(len, |bytes| rustix::io::pread(&handle.file, bytes, read.offset))
    }

    pub(super) fn write(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let write: WriteIn = request.take()?;
        let data = request.bytes(write.size as usize)?;
        let handle = self.handles.get(write.handle)?;
        // A program that was written to loses its set-ID bits and capabilities,
        // even if the guest's kernel does not ask for that.
        let kill = write.write_flags & abi::write::KILL_SUIDGID != 0 || !handle.trusted;
        // The guest's offset is the end of the file as the guest knows it; the
        // host may have appended meanwhile.
        let append = OFlags::from_bits_retain(write.flags).contains(OFlags::APPEND);
        let size = killing_set_id(kill, || {
            if append {
                rustix::io::pwritev2(&handle.file, &[IoSlice::new(data)], 0, ReadWriteFlags::APPEND)
            } else {
                rustix::io::pwrite(&handle.file, data, write.offset)
            }
        })?;
        answer.put(&WriteOut { size: size as u32, padding: 0 });
        Ok(())
    }

    /// Handles a close in the guest. Some file systems write only now, and
    /// report only now that they cannot.
    pub(super) fn flush(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let flush: FlushIn = request.take()?;
        let handle = self.handles.get(flush.handle)?;
        if handle.writable {
            let twin = rustix::io::dup(&handle.file)?;
            // SAFETY: the descriptor was made above, and is given up here.
            let closed = unsafe { libc::close(std::os::fd::IntoRawFd::into_raw_fd(twin)) };
            if closed != 0 {
                let errno = std::io::Error::last_os_error();
                return Err(errno.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error));
            }
        }
        Ok(())
    }

    pub(super) fn fsync(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let fsync: FsyncIn = request.take()?;
        let handle = self.handles.get(fsync.handle)?;
        if fsync.flags & abi::fsync::DATA_ONLY == 0 {
            rustix::fs::fsync(&handle.file)
        } else {
            rustix::fs::fdatasync(&handle.file)
        }
    }

    pub(super) fn fallocate(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let allocate: FallocateIn = request.take()?;
        let handle = self.handles.get(allocate.handle)?;
        let mode = FallocateFlags::from_bits_retain(allocate.mode);
        // Allocating space clears no set-ID bits, except in the modes that
        // change data.
        killing_set_id(true, || rustix::fs::fallocate(&handle.file, mode, allocate.offset, allocate.length))
    }

    /// Finds the next data or hole; the guest finds other positions itself.
    pub(super) fn lseek(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let seek: LseekIn = request.take()?;
        let handle = self.handles.get(seek.handle)?;
        let to = match seek.whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(seek.offset),
            libc::SEEK_HOLE => SeekFrom::Hole(seek.offset),
            _ => return Err(Errno::INVAL),
        };
        answer.put(&LseekOut { offset: rustix::fs::seek(&handle.file, to)? });
        Ok(())
    }

    pub(super) fn copy(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let copy: CopyIn = request.take()?;
        let (from, to) = (self.handles.get(copy.handle)?, self.handles.get(copy.to_handle)?);
        let (mut offset, mut to_offset) = (copy.offset, copy.to_offset);
        let len = copy.length.min(MAX_COPY) as usize;
        let copied = killing_set_id(true, || {
            rustix::fs::copy_file_range(&from.file, Some(&mut offset), &to.file, Some(&mut to_offset), len)
        })?;
        answer.put(&WriteOut { size: copied as u32, padding: 0 });
        Ok(())
    }

    pub(super) fn release(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let release: ReleaseIn = request.take()?;
        self.handles.remove(release.handle);
        Ok(())
    }
}
