//! The guest memory behind one descriptor chain.
//!
//! A driver may cut a packet into descriptors as it likes (virtio 1.2 §2.7.4),
//! so devices see a chain as one run of bytes: [`Buffers`]. It can be copied
//! from and to, and parts of it can be passed to `readv`-like system calls
//! without a copy ([`IoVecs`]).

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// Most pieces of guest memory in one system call: `IOV_MAX`, less one for a
/// buffer of the device's own.
pub const MAX_SEGMENTS: usize = 1023;

/// A chain that a driver must not make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// A part of the chain is not in guest memory.
    #[error("a descriptor points outside of guest memory")]
    OutsideMemory,
    /// The chain has more than [`MAX_SEGMENTS`] pieces.
    #[error("a descriptor chain has more than {MAX_SEGMENTS} pieces")]
    TooManySegments,
}

/// The readable or the writable bytes of a descriptor chain, in order.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// The bytes that the driver gives to the device.
    ///
    /// # Errors
    /// The chain is malformed.
    pub fn readable(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<Self, BadChain> {
        Self::collect(memory, chain, false)
    }

    /// The bytes that the device may write.
    ///
    /// # Errors
    /// The chain is malformed.
    pub fn writable(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<Self, BadChain> {
        Self::collect(memory, chain, true)
    }

    fn collect(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
        writable: bool,
    ) -> Result<Self, BadChain> {
        let mut buffers = Self { slices: Vec::with_capacity(4), len: 0 };
        // Descriptors are counted apart from the slices, so that a long chain
        // of empty ones ends as well.
        let mut descriptors = 0;
        for descriptor in chain {
            descriptors += 1;
            if descriptors > MAX_SEGMENTS {
                return Err(BadChain::TooManySegments);
            }
            if descriptor.is_write_only() == writable {
                buffers.extend(memory, descriptor.addr(), descriptor.len() as usize)?;
            }
        }
        Ok(buffers)
    }

    /// The bytes that the driver gives to the device, and the ranges that the
    /// device may write. This is for a device that answers later, see
    /// [`Self::of_ranges`].
    ///
    /// The chain is walked once: a driver may change it meanwhile, so checks of
    /// one walk would not hold for a second one.
    ///
    /// # Errors
    /// The chain is malformed.
    pub fn readable_and_output(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<(Self, Vec<(GuestAddress, usize)>), BadChain> {
        let mut readable = Self { slices: Vec::with_capacity(4), len: 0 };
        let mut output = Vec::with_capacity(4);
        for (index, descriptor) in chain.enumerate() {
            if index == MAX_SEGMENTS {
                return Err(BadChain::TooManySegments);
            }
            let (address, len) = (descriptor.addr(), descriptor.len() as usize);
            if !descriptor.is_write_only() {
                readable.extend(memory, address, len)?;
            } else if GuestMemoryBackend::check_range(memory, address, len) {
                output.push((address, len));
            } else {
                return Err(BadChain::OutsideMemory);
            }
        }
        Ok((readable, output))
    }

    /// The bytes of these ranges, which a device has kept of a chain.
    ///
    /// # Errors
    /// A range is not in guest memory, or there are too many.
    pub fn of_ranges(
        memory: &'m GuestMemoryMmap,
        ranges: &[(GuestAddress, usize)],
    ) -> Result<Self, BadChain> {
        let mut buffers = Self { slices: Vec::with_capacity(ranges.len().min(MAX_SEGMENTS)), len: 0 };
        for &(address, len) in ranges {
            buffers.extend(memory, address, len)?;
        }
        Ok(buffers)
    }

    fn extend(&mut self, memory: &'m GuestMemoryMmap, at: GuestAddress, len: usize) -> Result<(), BadChain> {
        for slice in GuestMemoryBackend::get_slices(memory, at, len) {
            if self.slices.len() == MAX_SEGMENTS {
                return Err(BadChain::TooManySegments);
            }
            self.push(slice.map_err(|_| BadChain::OutsideMemory)?);
        }
        Ok(())
    }

    fn push(&mut self, slice: VolatileSlice<'m>) {
        // A chain has at most 2^32 bytes, so a usize cannot overflow.
        self.len += slice.len();
        self.slices.push(slice);
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes from `offset` on into `data`. Returns how many there were.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.range(offset, data.len()) {
            if let Some(rest) = data.get_mut(done..) {
                done += slice.copy_to(rest);
            }
        }
        done
    }

    /// Copies `data` to the bytes from `offset` on. Returns how many fit.
    pub fn write(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.range(offset, data.len()) {
            if let Some(rest) = data.get(done..) {
                slice.copy_from(rest);
                done += slice.len();
            }
        }
        done
    }

    /// `len` bytes from `offset` on, or as many as there are, for a system call.
    #[must_use]
    pub fn io_vecs(&self, offset: usize, len: usize) -> IoVecs<'m> {
        let mut io_vecs = IoVecs { vecs: Vec::with_capacity(self.slices.len()), memory: PhantomData };
        io_vecs.extend(self, offset, len);
        io_vecs
    }

    /// The slices that cover `len` bytes from `offset` on.
    fn range(&self, offset: usize, len: usize) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        let mut skip = offset;
        let mut left = len;
        self.slices.iter().filter_map(move |slice| {
            let start = skip.min(slice.len());
            skip -= start;
            let count = left.min(slice.len() - start);
            left -= count;
            if count == 0 { None } else { slice.subslice(start, count).ok() }
        })
    }
}

/// Guest memory in the form that the kernel's vectored I/O takes.
///
/// The guest may change the bytes at any time; only the kernel touches them.
#[derive(Debug, Default)]
pub struct IoVecs<'m> {
    vecs: Vec<libc::iovec>,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m> IoVecs<'m> {
    /// Begins with a buffer of the device, which comes before the guest's.
    #[must_use]
    pub fn with_head(head: &'m mut [u8]) -> Self {
        let head = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() };
        Self { vecs: vec![head], memory: PhantomData }
    }

    /// Adds `len` bytes of `buffers` from `offset` on, or as many as there are,
    /// up to [`MAX_SEGMENTS`] in all. Returns how many bytes were added.
    pub fn extend(&mut self, buffers: &Buffers<'m>, offset: usize, len: usize) -> usize {
        let mut added = 0;
        let room = MAX_SEGMENTS.saturating_sub(self.vecs.len());
        for slice in buffers.range(offset, len).take(room) {
            let base = slice.ptr_guard_mut().as_ptr().cast();
            self.vecs.push(libc::iovec { iov_base: base, iov_len: slice.len() });
            added += slice.len();
        }
        added
    }

    /// Adds a buffer of the device behind the guest's.
    #[must_use]
    pub fn with_tail<'t>(mut self, tail: &'t mut [u8]) -> IoVecs<'t>
    where
        'm: 't,
    {
        self.vecs.push(libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() });
        IoVecs { vecs: self.vecs, memory: PhantomData }
    }

    /// Whether there are no bytes to read into or write from.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.vecs.is_empty()
    }

    /// Calls `readv(2)`.
    ///
    /// # Errors
    /// The system call's.
    pub fn readv(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: the vectors point into guest memory or a device's buffer, both
        // borrowed for as long as `self` lives.
        retry(|| unsafe { libc::readv(fd.as_raw_fd(), self.vecs.as_ptr(), self.count()) })
    }

    /// Calls `writev(2)`.
    ///
    /// # Errors
    /// The system call's.
    pub fn writev(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: as in `readv`.
        retry(|| unsafe { libc::writev(fd.as_raw_fd(), self.vecs.as_ptr(), self.count()) })
    }

    /// Calls `recvmsg(2)` without waiting. Descriptors that come along are
    /// closed.
    ///
    /// # Errors
    /// The system call's.
    pub fn receive(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = self.message();
        // SAFETY: the message has the vectors, see `readv`, and nothing else, so
        // the kernel writes only to a copy of its header.
        retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message.clone(), libc::MSG_DONTWAIT) })
    }

    /// Calls `sendmsg(2)` without waiting or raising a signal.
    ///
    /// # Errors
    /// The system call's.
    pub fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message has the vectors, see `readv`, and nothing else.
        retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: all zeroes are a valid, empty message.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vecs.as_ptr().cast_mut();
        message.msg_iovlen = self.vecs.len();
        message
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.vecs.len()).unwrap_or(libc::c_int::MAX)
    }
}

fn retry(call: impl Fn() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()).map_err(|_| io::Error::last_os_error()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use virtio_queue::QueueT;
    use vm_memory::Bytes;

    use super::*;
    use crate::devices::virtio::test_utils::{DriverQueue, Part, memory};

    #[test]
    fn a_chain_is_one_run_of_bytes() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0, 16);
        let mut queue = driver.queue();
        memory.write_slice(b"abc", GuestAddress(0x10_0000)).unwrap();
        memory.write_slice(b"defg", GuestAddress(0x20_0000)).unwrap();
        driver.add(&[
            Part::readable(0x10_0000, 3),
            Part::readable(0x10_1000, 0),
            Part::readable(0x20_0000, 4),
            Part::writable(0x30_0000, 2),
            Part::writable(0x30_1000, 2),
        ]);
        let chain = queue.pop_descriptor_chain(&memory).unwrap();
        let readable = Buffers::readable(&memory, chain.clone()).unwrap();
        let writable = Buffers::writable(&memory, chain).unwrap();
        assert_eq!((readable.len(), writable.len()), (7, 4));

        let mut data = [0; 4];
        assert_eq!(readable.read(2, &mut data), 4);
        assert_eq!(&data, b"cdef");
        assert_eq!(readable.read(5, &mut data), 2);
        assert_eq!(readable.read(7, &mut data), 0);
        assert_eq!(writable.write(1, b"123456"), 3);
        let mut second = [0; 2];
        memory.read_slice(&mut second, GuestAddress(0x30_1000)).unwrap();
        assert_eq!(&second, b"23");

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(readable.io_vecs(1, 5).send(ours.as_fd()).unwrap(), 5);
        let mut received = [0; 5];
        theirs.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"bcdef");
        theirs.write_all(b"xyz").unwrap();
        assert_eq!(writable.io_vecs(1, 100).receive(ours.as_fd()).unwrap(), 3);
        let error = writable.io_vecs(1, 100).receive(ours.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_chain_that_is_answered_later_is_walked_once() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0, 16);
        let mut queue = driver.queue();
        driver.add(&[
            Part::readable(0x10_0000, 3),
            Part::writable(0x20_0000, 4),
            Part::readable(0x10_1000, 2),
        ]);
        driver.add(&[Part::writable(memory.last_addr().0, 2)]);
        driver.add_indirect(0x20_0000, &vec![Part::writable(0x10_0000, 1); MAX_SEGMENTS + 1]);
        let mut next = || Buffers::readable_and_output(&memory, queue.pop_descriptor_chain(&memory).unwrap());
        let (readable, output) = next().unwrap();
        assert_eq!((readable.len(), output), (5, vec![(GuestAddress(0x20_0000), 4)]));
        assert_eq!(next().unwrap_err(), BadChain::OutsideMemory);
        assert_eq!(next().unwrap_err(), BadChain::TooManySegments);
    }

    #[test]
    fn bad_chains_are_refused() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0, 16);
        let mut queue = driver.queue();
        let end = memory.last_addr().0;
        driver.add(&[Part::readable(end, 2)]);
        driver.add(&[Part::readable(u64::MAX, 2)]);
        for _ in 0..2 {
            let chain = queue.pop_descriptor_chain(&memory).unwrap();
            assert_eq!(Buffers::readable(&memory, chain).unwrap_err(), BadChain::OutsideMemory);
        }
        let parts = vec![Part::writable(0x10_0000, 0); MAX_SEGMENTS + 1];
        driver.add_indirect(0x20_0000, &parts);
        let chain = queue.pop_descriptor_chain(&memory).unwrap();
        assert_eq!(Buffers::writable(&memory, chain).unwrap_err(), BadChain::TooManySegments);
    }
}
