//! The way from the tap to the guest.
//!
//! The length of a packet is known only after it was read. So the device
//! collects buffers of the guest for the longest packet, reads, uses the
//! buffers that it needed, and returns the others at the end of the batch.
//!
//! When the guest has too few buffers, the packet's rest goes into a buffer of
//! the device's own, and the packet is held until the guest has given more. The
//! tap is watched by edges, so packets that wait in it for buffers do not wake
//! the event loop again and again.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::time::Duration;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::tap::{HEADER_LEN, MAX_PACKET, Tap};
use crate::devices::virtio::buffers::{Buffers, IoVecs};
use crate::devices::virtio::rate::Limiter;
use crate::devices::virtio::rings::{add_used_together, next_chain};

/// The offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// The receiving side of a device.
#[derive(Debug)]
pub struct Receiver {
    /// Whether the tap may have packets.
    pub readable: bool,
    /// Set when the driver has made an invalid chain; the queue is ignored from
    /// then on.
    broken: bool,
    /// Whether a packet may be spread over several chains.
    mergeable: bool,
    /// Room in which any packet of this driver fits.
    longest: usize,
    held: Option<Vec<u8>>,
    spill: Box<[u8]>,
}

impl Receiver {
    /// Makes the receiving side for a driver that has just activated the
    /// device.
    pub fn new(mergeable: bool, longest: usize) -> Self {
        Self {
            readable: true,
            broken: false,
            mergeable,
            longest: longest.min(MAX_PACKET),
            held: None,
            spill: vec![0; MAX_PACKET].into(),
        }
    }

    /// Gives packets to the guest, or drops those that it can never take: at most
    /// `left`, and no more than `limiter` allows. Returns the time after which
    /// there may be more; until then they wait in the tap.
    pub fn receive(
        &mut self,
        tap: &Tap,
        memory: &GuestMemoryMmap,
        queue: &mut Queue,
        limiter: &mut Option<Limiter>,
        left: &mut usize,
    ) -> Option<Duration> {
        if self.broken || (!self.readable && self.held.is_none()) {
            return None;
        }
        let mut wait = None;
        // Notifications are enabled again when there are too few buffers.
        let _ = queue.disable_notification(memory);
        let mut room = Room::default();
        while *left > 0 && (self.readable || self.held.is_some()) {
            wait = limiter.as_mut().and_then(Limiter::wait);
            if wait.is_some() {
                break;
            }
            if self.collect(memory, queue, &mut room).is_err() {
                self.broken = true;
                return None;
            }
            if room.chains.is_empty() {
                break;
            }
            let len = match self.held.take() {
                Some(packet) if packet.len() <= room.len => room.write(&packet),
                Some(packet) => {
                    // There will never be more room than the whole ring.
                    let more_may_come = self.mergeable && room.chains.len() < usize::from(queue.size());
                    if more_may_come {
                        self.held = Some(packet);
                        break;
                    }
                    *left -= 1;
                    continue;
                }
                None => match self.read(tap, &room) {
                    Some(len) => len,
                    None => continue,
                },
            };
            *left -= 1;
            if let Some(limiter) = limiter {
                limiter.take(len.saturating_sub(HEADER_LEN) as u64);
            }
            let used = room.take(len);
            if add_used_together(queue, memory, &used).is_err() {
                self.broken = true;
                return None;
            }
        }
        let unused = u16::try_from(room.chains.len()).unwrap_or_default();
        queue.set_next_avail(queue.next_avail().wrapping_sub(unused));
        wait
    }

    /// Collects chains until every packet fits, or there are no more.
    fn collect<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        queue: &mut Queue,
        room: &mut Room<'m>,
    ) -> Result<(), BadQueue> {
        while room.chains.is_empty() || (self.mergeable && room.len < self.longest) {
            let Some(chain) = next_chain(queue, memory).map_err(|_| BadQueue)? else { return Ok(()) };
            let head = chain.head_index();
            let buffers = Buffers::writable(memory, chain).map_err(|_| BadQueue)?;
            if buffers.len() < HEADER_LEN {
                return Err(BadQueue);
            }
            room.len += buffers.len();
            room.chains.push_back((head, buffers));
        }
        Ok(())
    }

    /// Reads a packet. `None` if there is none, or if it does not fit and is
    /// now held.
    fn read(&mut self, tap: &Tap, room: &Room<'_>) -> Option<usize> {
        let (io_vecs, offered) = room.io_vecs();
        match tap.read(&io_vecs.with_tail(&mut self.spill)) {
            Ok(len) if len < HEADER_LEN => None,
            Ok(len) if len <= offered => Some(len),
            Ok(len) => {
                let mut packet = vec![0; offered];
                room.read(&mut packet);
                packet.extend_from_slice(self.spill.get(..len - offered).unwrap_or_default());
                self.held = Some(packet);
                None
            }
            Err(error) => {
                // There will be another edge. Other errors mean that the
                // interface is gone.
                self.readable = error.kind() == ErrorKind::Interrupted;
                None
            }
        }
    }
}

/// The driver breaks the rules of virtio.
struct BadQueue;

/// Chains that are available, in order, and not yet used.
#[derive(Default)]
struct Room<'m> {
    chains: VecDeque<(u16, Buffers<'m>)>,
    len: usize,
}

impl<'m> Room<'m> {
    /// Guest memory to read into, and its size: less than `len` if the chains
    /// are in too many pieces.
    fn io_vecs(&self) -> (IoVecs<'m>, usize) {
        let mut io_vecs = IoVecs::default();
        let mut len = 0;
        for (_, buffers) in &self.chains {
            let added = io_vecs.extend(buffers, 0, buffers.len());
            len += added;
            if added < buffers.len() {
                break;
            }
        }
        (io_vecs, len)
    }

    /// Copies the first bytes of the room into `packet`.
    fn read(&self, packet: &mut [u8]) {
        let mut done = 0;
        for (_, buffers) in &self.chains {
            done += packet.get_mut(done..).map_or(0, |rest| buffers.read(0, rest));
        }
    }

    /// Copies a packet that fits into the room; returns its length.
    fn write(&self, packet: &[u8]) -> usize {
        let mut done = 0;
        for (_, buffers) in &self.chains {
            done += packet.get(done..).map_or(0, |rest| buffers.write(0, rest));
        }
        done
    }

    /// Takes the chains that a packet of `len` bytes fills, and writes their
    /// number into its header.
    fn take(&mut self, len: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        let mut rest = len;
        let mut first = None;
        while rest > 0 {
            let Some((head, buffers)) = self.chains.pop_front() else { break };
            let part = rest.min(buffers.len());
            rest -= part;
            self.len -= buffers.len();
            // At most MAX_PACKET.
            used.push((head, u32::try_from(part).unwrap_or_default()));
            first.get_or_insert(buffers);
        }
        if let Some(first) = first {
            // At most the size of the queue.
            let count = u16::try_from(used.len()).unwrap_or_default();
            first.write(NUM_BUFFERS, &count.to_le_bytes());
        }
        used
    }
}
