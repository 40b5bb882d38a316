//! The file system device: queues on one side, the server's socket on the
//! other.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use husk_vmm_api::words::say;
use husk_vmm_api::{FsState, MAX_FUSE_MESSAGE};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::header::{IN_HEADER, InHeader, OUT_HEADER, OutHeader};
use super::in_flight::{InFlight, Pending};
use crate::devices::virtio::buffers::{Buffers, IoVecs};
use crate::devices::virtio::config;
use crate::devices::virtio::device::{ActivateError, Activation, VirtioDevice};
use crate::devices::virtio::interrupt::USED_RING;
use crate::devices::virtio::rate::{Limiter, Throttle};
use crate::devices::virtio::rings::{needs_interrupt, next_chain};
use crate::devices::virtio::watch::QueueWatch;

/// The queue for requests that must not wait behind others: `FUSE_FORGET`.
pub const HIPRIO: usize = 0;
/// The queue for everything else.
pub const REQUEST: usize = 1;

pub(super) const QUEUE_SIZES: [u16; 2] = [128, 128];

/// Bytes of a tag (virtio 1.2 §5.11.4).
pub const TAG_LENGTH: usize = 36;

/// How long to wait when the kernel has no memory for a packet.
const OUT_OF_MEMORY: Duration = Duration::from_millis(1);

/// Most requests, and most answers, before the other direction has its turn.
const BATCH: usize = 64;

/// The device cannot be made, or cannot get a server.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is empty, too long, or not printable ASCII.
    #[error("tag {0:?} is not 1 to {TAG_LENGTH} bytes of printable ASCII")]
    Tag(String),
    /// The device has a server already.
    #[error("the file system device has a server already")]
    Attached,
    /// The guest has a session with a server that has ended. Another server
    /// would not know the guest's files.
    #[error("the file server of this machine has gone, and the guest had files of it open: restart the pod")]
    Gone,
    /// A system call failed.
    #[error("make the file system device: {0}")]
    Io(#[from] io::Error),
}

/// The server that answers the requests.
#[derive(Debug)]
enum Server {
    /// There is no server yet; requests wait.
    Waiting,
    /// The server is at the other end of this socket.
    Serving(OwnedFd),
    /// The server has ended; requests fail.
    Gone,
}

/// The file system device.
pub struct Fs {
    tag: String,
    pub(super) watch: QueueWatch,
    server: Server,
    /// The socket of a server that has ended, for the event loop to remove.
    pub(super) lost: Option<OwnedFd>,
    /// Set while the server's socket takes no more.
    pub(super) stalled: bool,
    /// Whether the guest has begun a session, and so knows files by the
    /// server's names.
    session: bool,
    in_flight: InFlight,
    /// How much the server may be asked. What must not wait behind other requests does
    /// not wait for it either.
    pub(super) limit: Option<Throttle>,
    activation: Option<Activation>,
}

impl Fs {
    /// Makes a device without a server, which the guest knows by `tag`.
    ///
    /// # Errors
    /// [`FsError::Tag`], [`FsError::Io`].
    pub fn new(tag: &str) -> Result<Self, FsError> {
        let printable = tag.bytes().all(|byte| byte.is_ascii_graphic());
        if tag.is_empty() || tag.len() > TAG_LENGTH || !printable {
            return Err(FsError::Tag(tag.to_owned()));
        }
        Ok(Self {
            tag: tag.to_owned(),
            watch: QueueWatch::new()?,
            server: Server::Waiting,
            lost: None,
            stalled: false,
            session: false,
            in_flight: InFlight::default(),
            limit: None,
            activation: None,
        })
    }

    /// Limits what its server is asked, before the event loop knows the device.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn limit(&mut self, limiter: Option<Limiter>) -> io::Result<()> {
        self.limit = Throttle::new(limiter)?;
        Ok(())
    }

    /// Connects the server: a `SOCK_SEQPACKET` socket on which each packet is
    /// one FUSE message. Must be called before the event loop knows the device.
    ///
    /// # Errors
    /// [`FsError::Attached`], [`FsError::Gone`].
    pub fn attach(&mut self, socket: OwnedFd) -> Result<(), FsError> {
        match self.server {
            Server::Waiting => {}
            Server::Serving(_) => return Err(FsError::Attached),
            Server::Gone => return Err(FsError::Gone),
        }
        self.server = Server::Serving(socket);
        Ok(())
    }

    /// Whether the device has a server.
    #[must_use]
    pub const fn state(&self) -> FsState {
        match self.server {
            Server::Waiting => FsState::Waiting,
            Server::Serving(_) => FsState::Serving,
            Server::Gone => FsState::Gone,
        }
    }

    pub(super) fn tag(&self) -> &str {
        &self.tag
    }

    pub(super) const fn session(&self) -> bool {
        self.session
    }

    /// Moves requests and answers. Returns false if there may be more, so that
    /// the device wants to be called again soon.
    pub(super) fn serve(&mut self) -> bool {
        let answers_done = self.receive();
        let requests_done = self.forward();
        answers_done && requests_done
    }

    /// Sends requests to the server. True if none is left that can be sent now.
    fn forward(&mut self) -> bool {
        self.stalled = false;
        let Some(activation) = &mut self.activation else { return true };
        let Activation { memory, queues, interrupt, .. } = activation;
        let memory = &*memory;
        let mut left = BATCH;
        for (index, queue) in queues.iter_mut().enumerate() {
            let before = queue.next_used();
            let mut limit = self.limit.as_mut().filter(|_| index == REQUEST);
            while left > 0 && !self.stalled && !self.in_flight.is_full() {
                if limit.as_mut().is_some_and(|limit| limit.is_closed()) {
                    break;
                }
                let Ok(Some(chain)) = next_chain(queue, memory) else { break };
                left -= 1;
                let head = chain.head_index();
                let request = Request::read(memory, chain);
                let bytes = request.bytes();
                let sent = match &self.server {
                    Server::Serving(socket) => request.send(socket.as_fd(), &mut self.in_flight, index, head),
                    Server::Waiting => Sent::Stalled,
                    Server::Gone => Sent::Failed(libc::EIO),
                };
                if let Some(limit) = limit.as_mut().filter(|_| !matches!(sent, Sent::Stalled)) {
                    limit.take(bytes);
                }
                match sent {
                    Sent::Awaited => self.session |= request.header.is_some_and(|header| header.is_init()),
                    Sent::Done => return_chain(queue, memory, head, 0),
                    Sent::Failed(errno) => {
                        let written = request.fail(memory, errno);
                        return_chain(queue, memory, head, written);
                    }
                    Sent::Stalled => {
                        // The request stays in the ring until the server can
                        // take it.
                        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                        self.stalled = true;
                    }
                }
            }
            if needs_interrupt(queue, memory, before) {
                interrupt.trigger(USED_RING);
            }
        }
        left > 0 || self.stalled
    }

    /// Passes answers to the guest. True if there are no more.
    fn receive(&mut self) -> bool {
        let Server::Serving(socket) = &self.server else { return true };
        let mut befores: Vec<u16> = Vec::new();
        if let Some(activation) = &self.activation {
            befores.extend(activation.queues.iter().map(QueueT::next_used));
        }
        let mut end = Received::More;
        for _ in 0..BATCH {
            end = receive_one(socket.as_fd(), &mut self.in_flight, self.activation.as_mut());
            if !matches!(end, Received::More) {
                break;
            }
        }
        if matches!(end, Received::Gone) {
            say(format_args!("husk-vmm: the file server has ended; the guest's volumes answer with EIO"));
            if let Server::Serving(socket) = std::mem::replace(&mut self.server, Server::Gone) {
                self.lost = Some(socket);
            }
            self.fail_all();
        }
        let Some(Activation { memory, queues, interrupt, .. }) = &mut self.activation else { return true };
        let asked = queues.iter().zip(befores).any(|(queue, before)| needs_interrupt(queue, memory, before));
        if asked {
            interrupt.trigger(USED_RING);
        }
        !matches!(end, Received::More)
    }

    fn fail_all(&mut self) {
        let Some(Activation { memory, queues, .. }) = &mut self.activation else { return };
        for pending in self.in_flight.take_all() {
            let written = Buffers::of_ranges(memory, &pending.output)
                .map_or(0, |output| write_error(&output, pending.unique, libc::EIO));
            if let Some(queue) = queues.get_mut(pending.queue) {
                return_chain(queue, memory, pending.head, written);
            }
        }
    }

    /// The server's socket, for the event loop.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.server {
            Server::Serving(socket) => Some(socket.as_fd()),
            _ => None,
        }
    }
}

/// A request as the guest made it.
struct Request<'m> {
    /// The request's header; `None` when the chain is shorter than a header, or
    /// malformed.
    header: Option<InHeader>,
    input: Buffers<'m>,
    output: Vec<(GuestAddress, usize)>,
}

/// The result of sending a request.
enum Sent {
    /// The server will answer.
    Awaited,
    /// The request has no answer by its nature.
    Done,
    /// The request was not sent, for this errno.
    Failed(i32),
    /// The request cannot be sent now.
    Stalled,
}

impl<'m> Request<'m> {
    fn read(memory: &'m GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> Self {
        let Ok((input, output)) = Buffers::readable_and_output(memory, chain) else {
            return Self { header: None, input: Buffers::default(), output: Vec::new() };
        };
        let mut bytes = [0; IN_HEADER];
        let complete = input.read(0, &mut bytes) == IN_HEADER;
        let header = InHeader::read_from_bytes(&bytes).ok().filter(|_| complete);
        Self { header, input, output }
    }

    /// Bytes of the request, and of the room for its answer.
    fn bytes(&self) -> u64 {
        let room = self.output.iter().map(|(_, len)| *len as u64).fold(0, u64::saturating_add);
        room.saturating_add(self.input.len() as u64)
    }

    fn send(&self, socket: BorrowedFd<'_>, in_flight: &mut InFlight, queue: usize, head: u16) -> Sent {
        let Some(mut header) = self.header else { return Sent::Done };
        let room: usize = self.output.iter().map(|(_, len)| *len).fold(0, usize::saturating_add);
        // The server would have to detect a wrong length, so it is refused
        // here.
        if self.input.len() > MAX_FUSE_MESSAGE || header.len as usize != self.input.len() {
            return Sent::Failed(libc::EINVAL);
        }
        if header.is_interrupt() {
            // The request that it names may be asked for again; Linux's driver
            // never sends such a request.
            return Sent::Done;
        }
        if header.has_answer() && room < OUT_HEADER {
            return Sent::Done;
        }
        let unique = header.unique;
        header.unique = in_flight.next_number();
        let mut bytes = [0; IN_HEADER];
        let _ = header.write_to(&mut bytes);
        let mut packet = IoVecs::with_head(&mut bytes);
        packet.extend(&self.input, IN_HEADER, usize::MAX);
        match packet.send(socket) {
            Ok(_) if header.has_answer() => {
                in_flight.add(Pending { queue, head, unique, output: self.output.clone() });
                Sent::Awaited
            }
            Ok(_) => {
                in_flight.skip_number();
                Sent::Done
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) => Sent::Stalled,
                Some(libc::ENOBUFS | libc::ENOMEM) => {
                    // The socket stays writable, so without a pause the loop
                    // would spin.
                    std::thread::sleep(OUT_OF_MEMORY);
                    Sent::Stalled
                }
                _ => Sent::Failed(libc::EIO),
            },
        }
    }

    /// Writes an error as the answer; returns the bytes that it took.
    fn fail(&self, memory: &GuestMemoryMmap, errno: i32) -> u32 {
        match (self.header, Buffers::of_ranges(memory, &self.output)) {
            (Some(header), Ok(output)) if header.has_answer() => write_error(&output, header.unique, errno),
            _ => 0,
        }
    }
}

fn write_error(output: &Buffers<'_>, unique: u64, errno: i32) -> u32 {
    if output.len() < OUT_HEADER {
        return 0;
    }
    output.write(0, OutHeader::error(unique, errno).as_bytes());
    OUT_HEADER as u32
}

/// Puts a chain into the used ring. If the rings are broken, the driver cannot
/// be told, and this chain is lost.
fn return_chain(queue: &mut Queue, memory: &GuestMemoryMmap, head: u16, written: u32) {
    let _ = queue.add_used(memory, head, written);
}

/// The result of an attempt to receive.
enum Received {
    /// A packet came; there may be another.
    More,
    /// No packet is there now.
    Nothing,
    /// The server has ended.
    Gone,
}

fn receive_one(
    socket: BorrowedFd<'_>,
    in_flight: &mut InFlight,
    activation: Option<&mut Activation>,
) -> Received {
    let mut header = OutHeader::new_zeroed();
    let len = match peek(socket, header.as_mut_bytes()) {
        Ok(0) => return Received::Gone,
        Ok(len) => len,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Received::Nothing,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return Received::More,
        Err(_) => return Received::Gone,
    };
    // The server is trusted code, but it processes a guest's data, so its
    // answers are checked.
    let pending = in_flight.get(header.unique).filter(|_| len >= OUT_HEADER);
    let (Some(pending), Some(activation)) = (pending, activation) else {
        return discard(socket);
    };
    let memory = &activation.memory;
    let Ok(output) = Buffers::of_ranges(memory, &pending.output) else { return discard(socket) };
    let (unique, head, queue) = (pending.unique, pending.head, pending.queue);
    let written = if header.len as usize == len && len <= output.len() {
        let mut bytes = [0; OUT_HEADER];
        let mut packet = IoVecs::with_head(&mut bytes);
        packet.extend(&output, OUT_HEADER, len - OUT_HEADER);
        match packet.receive(socket) {
            Ok(received) if received == len => {
                output.write(0, OutHeader { unique, ..header }.as_bytes());
                header.len
            }
            Ok(_) => write_error(&output, unique, libc::EIO),
            Err(_) => return Received::Gone,
        }
    } else {
        if matches!(discard(socket), Received::Gone) {
            return Received::Gone;
        }
        write_error(&output, unique, libc::EIO)
    };
    in_flight.take(header.unique);
    if let Some(queue) = activation.queues.get_mut(queue) {
        return_chain(queue, memory, head, written);
    }
    Received::More
}

/// Reads the first bytes of the next packet, and leaves it in the socket.
/// Returns the length of the whole packet, and 0 at the end of the connection.
fn peek(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most `bytes.len()` bytes to `bytes`.
    let len = unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), flags) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Takes the next packet and drops it.
fn discard(socket: BorrowedFd<'_>) -> Received {
    let mut nothing = [0; 1];
    match IoVecs::with_head(&mut nothing).receive(socket) {
        Ok(_) => Received::More,
        Err(_) => Received::Gone,
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // The tag, padded with zeroes, and the number of request queues.
        let mut space = [0; TAG_LENGTH + 4];
        for (to, from) in space.iter_mut().zip(self.tag.bytes()) {
            *to = from;
        }
        if let Some(queues) = space.get_mut(TAG_LENGTH..) {
            queues.copy_from_slice(&1u32.to_le_bytes());
        }
        config::read(&space, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        activation.begin("fs", QUEUE_SIZES.len(), &mut self.watch)?;
        self.activation = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        // Requests in flight get no answer: their memory may be in use for something
        // else.
        self.in_flight.take_all();
        self.activation = None;
        self.watch.reset();
    }

    fn activation(&self) -> Option<&Activation> {
        self.activation.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use vm_memory::Bytes;

    use super::*;
    use crate::devices::virtio::buffers::MAX_SEGMENTS;
    use crate::devices::virtio::test_utils::{DriverQueue, Part, memory};

    #[test]
    fn a_chain_that_grows_while_it_is_read_stays_bounded() {
        const TABLE: u64 = 0x20_0000;
        const READS: usize = 50_000;
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0, 16);
        let mut queue = driver.queue();
        driver.add_indirect(TABLE, &vec![Part::writable(0x10_0000, 1); 4000]);
        let chain = queue.pop_descriptor_chain(&memory).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Another vCPU of the guest flips the first descriptor's flag: it is
            // the chain's last one, and then is not.
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for flags in [2u16, 3] {
                        memory.write_obj(flags, GuestAddress(TABLE + 12)).unwrap();
                    }
                }
            });
            let longest = (0..READS).map(|_| Request::read(&memory, chain.clone()).output.len()).max();
            done.store(true, Ordering::Relaxed);
            assert!(longest.unwrap() <= MAX_SEGMENTS, "{longest:?}");
        });
    }
}
