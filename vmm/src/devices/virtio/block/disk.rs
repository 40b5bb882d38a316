//! The file or block device behind a virtio block device, and the execution of
//! requests on it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};

use virtio_bindings::virtio_blk as vb;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap};

use super::request::{Buffer, Operation, Request, total};
use super::{SECTOR, SERIAL_LENGTH};

/// Bytes of a range in a discard or write-zeroes request
/// (`struct virtio_blk_discard_write_zeroes`): sector, sectors, flags.
const RANGE: usize = 16;
/// Most ranges in one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 16;
/// Most sectors in one such range: 1 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status byte, one of `VIRTIO_BLK_S_*`.
    pub status: u8,
    /// Bytes written to guest memory, without the status byte.
    pub written: u32,
}

/// The reason for which a request failed.
enum Failure {
    /// The request is invalid.
    Invalid,
    /// The file does not support this operation.
    Unsupported,
    /// The host's file failed.
    Io,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => Self::Unsupported,
            _ => Self::Io,
        }
    }
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    /// Makes a disk of `file` with its present size; a file that grows later
    /// does not make the disk larger. A last part of less than a sector is not
    /// reachable.
    ///
    /// # Errors
    /// The size cannot be determined: the descriptor is neither a file nor a
    /// block device.
    pub fn new(file: OwnedFd, read_only: bool) -> io::Result<Self> {
        let mut file = File::from(file);
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, sectors: size / SECTOR, read_only })
    }

    /// The capacity in sectors.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes are refused.
    #[must_use]
    pub const fn read_only(&self) -> bool {
        self.read_only
    }

    /// Executes `request`. `before_blocking` is called once before the first
    /// call that may wait for the file.
    pub fn execute(
        &self,
        request: &Request,
        memory: &GuestMemoryMmap,
        serial: &[u8; SERIAL_LENGTH],
        before_blocking: &dyn Fn(),
    ) -> Outcome {
        let result = match request.operation {
            Operation::Read(sector) => self.read(sector, &request.output, memory, before_blocking),
            Operation::GetId => get_id(&request.output, memory, serial),
            Operation::Unsupported => Err(Failure::Unsupported),
            _ if self.read_only && request.operation != Operation::Flush => Err(Failure::Invalid),
            operation => {
                before_blocking();
                match operation {
                    Operation::Write(sector) => self.write(sector, &request.input, memory),
                    Operation::Flush => self.file.sync_data().map_err(Failure::from),
                    _ => self.clear(operation, &request.input, memory),
                }
                .map(|()| 0)
            }
        };
        match result {
            Ok(written) => Outcome { status: vb::VIRTIO_BLK_S_OK as u8, written },
            Err(Failure::Unsupported) => Outcome { status: vb::VIRTIO_BLK_S_UNSUPP as u8, written: 0 },
            Err(Failure::Invalid | Failure::Io) => {
                Outcome { status: vb::VIRTIO_BLK_S_IOERR as u8, written: 0 }
            }
        }
    }

    /// The byte position of `length` bytes from `sector` on, if the disk has
    /// them.
    fn position(&self, sector: u64, length: u64) -> Result<i64, Failure> {
        let end = sector.checked_add(length / SECTOR).ok_or(Failure::Invalid)?;
        if !length.is_multiple_of(SECTOR) || end > self.sectors {
            return Err(Failure::Invalid);
        }
        i64::try_from(sector * SECTOR).map_err(|_| Failure::Invalid)
    }

    fn read(
        &self,
        sector: u64,
        buffers: &[Buffer],
        memory: &GuestMemoryMmap,
        before_blocking: &dyn Fn(),
    ) -> Result<u32, Failure> {
        let length = total(buffers);
        let position = self.position(sector, length)?;
        let mut parts = Parts::new(buffers, memory)?;
        // Data in the page cache is there at once; only the rest may block.
        let mut flags = libc::RWF_NOWAIT;
        parts.transfer(position, |parts, position| {
            if flags != 0 {
                // SAFETY: `parts` describes guest memory, which is mapped and
                // which only raw and volatile accesses reach.
                let result =
                    unsafe { libc::preadv2(self.file.as_raw_fd(), parts.0, parts.1, position, flags) };
                if result > 0 {
                    return result;
                }
                flags = 0;
                before_blocking();
            }
            // SAFETY: as above.
            unsafe { libc::preadv(self.file.as_raw_fd(), parts.0, parts.1, position) }
        })?;
        u32::try_from(length).map_err(|_| Failure::Invalid)
    }

    fn write(&self, sector: u64, buffers: &[Buffer], memory: &GuestMemoryMmap) -> Result<(), Failure> {
        let position = self.position(sector, total(buffers))?;
        Parts::new(buffers, memory)?.transfer(position, |parts, position| {
            // SAFETY: `parts` describes guest memory, which is mapped and
            // which only raw and volatile accesses reach.
            unsafe { libc::pwritev(self.file.as_raw_fd(), parts.0, parts.1, position) }
        })
    }

    /// Discards or zeroes the ranges in `buffers`.
    fn clear(
        &self,
        operation: Operation,
        buffers: &[Buffer],
        memory: &GuestMemoryMmap,
    ) -> Result<(), Failure> {
        let length = total(buffers) as usize;
        if length == 0 || !length.is_multiple_of(RANGE) || length > RANGE * MAX_RANGES as usize {
            return Err(Failure::Invalid);
        }
        let mut bytes = Vec::with_capacity(length);
        for buffer in buffers {
            let mut part = vec![0u8; buffer.length as usize];
            memory.read_slice(&mut part, buffer.address).map_err(|_| Failure::Invalid)?;
            bytes.extend_from_slice(&part);
        }
        for range in bytes.as_chunks::<RANGE>().0 {
            let range = u128::from_le_bytes(*range);
            let (sector, sectors, flags) = (range as u64, (range >> 64) as u32, (range >> 96) as u32);
            let unmap = flags & vb::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !vb::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0
                || unmap && operation == Operation::Discard
            {
                // Unknown flags are unsupported (§5.2.6.2).
                return Err(Failure::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Failure::Invalid);
            }
            let length = u64::from(sectors) * SECTOR;
            let position = self.position(sector, length)?;
            let keep_allocated = operation == Operation::WriteZeroes && !unmap;
            self.zero(position, length as i64, keep_allocated)?;
        }
        Ok(())
    }

    /// Makes a range read as zeroes.
    fn zero(&self, position: i64, length: i64, keep_allocated: bool) -> Result<(), Failure> {
        if length == 0 {
            return Ok(());
        }
        let allocate = |mode| {
            // SAFETY: a call on an open file without any pointer.
            let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, position, length) };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        if keep_allocated
            // tmpfs supports holes only.
            && allocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE).is_ok()
        {
            return Ok(());
        }
        Ok(allocate(hole)?)
    }
}

fn get_id(
    buffers: &[Buffer],
    memory: &GuestMemoryMmap,
    serial: &[u8; SERIAL_LENGTH],
) -> Result<u32, Failure> {
    let buffer = buffers.first().ok_or(Failure::Invalid)?;
    if (buffer.length as usize) < SERIAL_LENGTH {
        return Err(Failure::Invalid);
    }
    memory.write_slice(serial, buffer.address).map_err(|_| Failure::Invalid)?;
    Ok(SERIAL_LENGTH as u32)
}

/// Guest memory in the form that the kernel's vectored I/O takes.
struct Parts(Vec<libc::iovec>);

impl Parts {
    fn new(buffers: &[Buffer], memory: &GuestMemoryMmap) -> Result<Self, Failure> {
        let mut parts = Vec::with_capacity(buffers.len());
        for buffer in buffers {
            // A buffer may reach from one region of memory into the next.
            for slice in GuestMemoryBackend::get_slices(memory, buffer.address, buffer.length as usize) {
                let slice = slice.map_err(|_| Failure::Invalid)?;
                let guard = slice.ptr_guard_mut();
                parts.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() });
            }
        }
        Ok(Self(parts))
    }

    /// Repeats `call` until all bytes are moved.
    fn transfer(
        &mut self,
        mut position: i64,
        mut call: impl FnMut((*const libc::iovec, i32), i64) -> isize,
    ) -> Result<(), Failure> {
        let mut rest = self.0.as_mut_slice();
        while !rest.is_empty() {
            let count = rest.len().min(libc::UIO_MAXIOV as usize) as i32;
            let moved = call((rest.as_ptr(), count), position);
            if moved < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(Failure::Io);
            }
            if moved == 0 {
                // The file has become shorter than it was.
                return Err(Failure::Io);
            }
            position += moved as i64;
            rest = advance(rest, moved as usize);
        }
        Ok(())
    }
}

/// Skips the first `moved` bytes of `parts`.
fn advance(parts: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let whole = parts
        .iter()
        .take_while(|part| {
            let passed = part.iov_len <= moved;
            moved -= if passed { part.iov_len } else { 0 };
            passed
        })
        .count();
    let rest = parts.get_mut(whole..).unwrap_or_default();
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(moved);
        first.iov_len -= moved;
    }
    rest
}
