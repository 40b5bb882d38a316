//! Lists directories.

use std::mem::MaybeUninit;

use rustix::fs::{CWD, FileType, Mode, OFlags, RawDir, SeekFrom};
use zerocopy::IntoBytes;

use super::nodes::path;
use super::{MAX_DATA, Passthrough};
use crate::Errno;
use crate::abi::{Dirent, EntryOut, OpenOut, ReadIn};
use crate::message::{Answer, Request};

/// Most bytes of entries that are read at a time.
const CHUNK: usize = 16 << 10;
/// Bytes of the longest entry (getdents64(2)).
const LONGEST: usize = 280;

impl Passthrough {
    pub(super) fn opendir(&self, request: &mut Request<'_>, answer: &mut Answer<'_>) -> Result<(), Errno> {
        let node = self.nodes.get(request.header.node)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, path(&node.fd()), flags, Mode::empty())?;
        let handle = self.handles.add(directory, false, node.is_trusted())?;
        answer.put(&OpenOut { handle, ..OpenOut::default() });
        Ok(())
    }

    /// Returns the entries from an offset on, as many as fit. With `plus`, each
    /// comes with the attributes that a lookup would return.
    ///
    /// A client that deletes entries as it reads, as `rm -r` does, must not
    /// miss one. A file system may count its entries to find an offset (tmpfs
    /// before Linux 6.6 does), so a directory that is read on is not sought,
    /// and no more entries are read than fit into the answer.
    pub(super) fn readdir(
        &self,
        request: &mut Request<'_>,
        answer: &mut Answer<'_>,
        plus: bool,
    ) -> Result<(), Errno> {
        let read: ReadIn = request.take()?;
        let node = self.nodes.get(request.header.node)?;
        let handle = self.handles.get(read.handle)?;
        let room = read.size.min(MAX_DATA) as usize;
        // The shortest entry has 24 bytes; it becomes one of 32, or of 160 with
        // attributes.
        let fitting = if plus { room / 7 } else { room / 4 * 3 };
        let mut chunk = [MaybeUninit::uninit(); CHUNK];
        let chunk = chunk.get_mut(..fitting.clamp(LONGEST, CHUNK)).unwrap_or_default();

        let mut position = super::nodes::lock(&handle.position);
        if position.take() != Some(read.offset) {
            rustix::fs::seek(&handle.file, SeekFrom::Start(read.offset))?;
        }
        let mut next = Some(read.offset);
        let mut entries = RawDir::new(&handle.file, chunk);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // The entries so far are returned; the error comes again with
                // the rest.
                Err(_) if !answer.is_empty() => {
                    next = None;
                    break;
                }
                Err(errno) => return Err(errno),
            };
            let name = entry.file_name();
            let size = size_of::<Dirent>() + name.count_bytes();
            let size = if plus { size + size_of::<EntryOut>() } else { size };
            if answer.len() + size.next_multiple_of(8) > room {
                next = None;
                break;
            }
            next = Some(entry.next_entry_cookie());
            let own = matches!(name.to_bytes(), b"." | b"..");
            let mut dirent = Dirent {
                ino: entry.ino(),
                offset: entry.next_entry_cookie(),
                namelen: name.count_bytes() as u32,
                kind: kind(entry.file_type()),
            };
            if plus {
                // Node 0 stands for an entry of which nothing more is known.
                let mut known = EntryOut::default();
                if !own && let Ok((child, stat)) = self.find(&node, name) {
                    known = Self::entry(&child, &stat);
                    dirent.ino = known.attr.ino;
                }
                answer.put_bytes(known.as_bytes());
            }
            answer.put(&dirent);
            answer.put_bytes(name.to_bytes());
            answer.align();
            if entries.is_buffer_empty() {
                break;
            }
        }
        *position = next;
        Ok(())
    }
}

/// The value of `d_type` in readdir(3).
fn kind(kind: FileType) -> u32 {
    let kind = match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    };
    kind.into()
}
