//! Lets the event loop watch the queues of a device that is activated and reset
//! on a vCPU thread.
//!
//! Only the event loop's thread may change the set of descriptors that the loop
//! watches. So [`QueueWatch`] keeps the queues to be watched next, and signals
//! its `wake` eventfd; the loop then calls [`QueueWatch::sync`]. It watches
//! duplicates of the queues' eventfds: a reset may close the originals at any
//! time, and a descriptor must leave the loop before it is closed.

use std::io;

use event_manager::{EventOps, Events};
use husk_vmm_api::words::say;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The source of an event of the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The device was activated, was reset, or asked to be called again.
    Wake,
    /// The driver notified this queue.
    Queue(usize),
    /// A descriptor of the device's own, with the token that it was added with.
    Other(u32),
}

/// The first token for a device's own descriptors.
pub const FIRST_TOKEN: u32 = 16;

const WAKE: u32 = 0;
const FIRST_QUEUE: u32 = 1;

/// The queues that the event loop watches, see the [module](self).
#[derive(Debug)]
pub struct QueueWatch {
    wake: EventFd,
    watched: Vec<EventFd>,
    next: Option<Vec<EventFd>>,
}

impl QueueWatch {
    /// Makes a watch of no queues.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self { wake: EventFd::new(EFD_NONBLOCK)?, watched: Vec::new(), next: None })
    }

    /// Registers the wake eventfd, in
    /// [`MutEventSubscriber::init`](event_manager::MutEventSubscriber::init).
    pub fn init(&self, ops: &mut EventOps) {
        add(ops, Events::with_data(&self.wake, WAKE, EventSet::IN));
    }

    /// Watches the queues of an activated device. May be called on any thread.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn activate(&mut self, queue_events: &[EventFd]) -> io::Result<()> {
        self.next = Some(queue_events.iter().map(EventFd::try_clone).collect::<io::Result<_>>()?);
        self.wake();
        Ok(())
    }

    /// Watches no queues any more, because the device was reset. May be called
    /// on any thread.
    pub fn reset(&mut self) {
        self.next = Some(Vec::new());
        self.wake();
    }

    /// Makes the loop call the device again soon, which has interrupted its
    /// work in favour of other devices.
    pub fn wake(&self) {
        // Writing fails only when the counter is full, and then the loop wakes up.
        let _ = self.wake.write(1);
    }

    /// Updates the set of watched descriptors. True if there was an activation
    /// or a reset since the last call. A device calls this first for every
    /// event.
    pub fn sync(&mut self, ops: &mut EventOps) -> bool {
        let Some(next) = self.next.take() else { return false };
        for event in self.watched.drain(..) {
            remove(ops, Events::empty(&event));
        }
        for (token, event) in (FIRST_QUEUE..).zip(&next) {
            add(ops, Events::with_data(event, token, EventSet::IN));
        }
        self.watched = next;
        true
    }

    /// Returns the source of an event, and clears it.
    pub fn take(&self, events: Events) -> Source {
        match events.data() {
            WAKE => {
                // Reading fails only if it was read already.
                let _ = self.wake.read();
                Source::Wake
            }
            token @ FIRST_QUEUE..FIRST_TOKEN => {
                let queue = (token - FIRST_QUEUE) as usize;
                if let Some(event) = self.watched.get(queue) {
                    let _ = event.read();
                }
                Source::Queue(queue)
            }
            token => Source::Other(token),
        }
    }
}

/// Adds a descriptor to the loop. That fails only when the kernel is out of
/// memory or the user's limit of epoll watches is reached; the device then
/// misses its events, which is logged.
pub fn add(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.add(events) {
        say(format_args!("husk-vmm: failed to watch descriptor {}: {error:?}", events.fd()));
    }
}

/// Changes the events that a descriptor is watched for.
pub fn modify(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.modify(events) {
        say(format_args!("husk-vmm: failed to change the watch of descriptor {}: {error:?}", events.fd()));
    }
}

/// Removes a descriptor, before it is closed.
pub fn remove(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.remove(events) {
        say(format_args!("husk-vmm: failed to stop watching descriptor {}: {error:?}", events.fd()));
    }
}
