//! How a device that is activated and reset on a vCPU thread gets its queues
//! watched by the event loop.
//!
//! Only the event loop's thread may change what the loop watches. So
//! [`QueueWatch`] keeps what it shall watch next, and rings its `wake` eventfd;
//! the loop then calls [`QueueWatch::sync`]. It watches duplicates of the
//! queues' eventfds: a reset may close the originals at any time, and a
//! descriptor must leave the loop before it is closed.

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
    /// A descriptor of the device's own, with the token it was added with.
    Other(u32),
}

/// Tokens of a device's own descriptors start here.
pub const FIRST_TOKEN: u32 = 16;

const WAKE: u32 = 0;
const FIRST_QUEUE: u32 = 1;

/// See the [module](self).
#[derive(Debug)]
pub struct QueueWatch {
    wake: EventFd,
    watched: Vec<EventFd>,
    next: Option<Vec<EventFd>>,
}

impl QueueWatch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self { wake: EventFd::new(EFD_NONBLOCK)?, watched: Vec::new(), next: None })
    }

    /// For [`MutEventSubscriber::init`](event_manager::MutEventSubscriber::init).
    pub fn init(&self, ops: &mut EventOps) {
        add(ops, Events::with_data(&self.wake, WAKE, EventSet::IN));
    }

    /// The device was activated; callable on any thread.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn activate(&mut self, queue_events: &[EventFd]) -> io::Result<()> {
        self.next = Some(queue_events.iter().map(EventFd::try_clone).collect::<io::Result<_>>()?);
        self.wake();
        Ok(())
    }

    /// The device was reset; callable on any thread.
    pub fn reset(&mut self) {
        self.next = Some(Vec::new());
        self.wake();
    }

    /// Makes the loop call the device again soon: it stopped in the midst of
    /// its work for the sake of other devices.
    pub fn wake(&self) {
        // Writing fails only when the counter is full, and then the loop wakes up.
        let _ = self.wake.write(1);
    }

    /// Brings the loop up to date. True if there was an activation or a reset
    /// since the last call. A device calls it first for every event.
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

    /// Tells what an event is about, and takes it.
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

/// Adds to the loop. It fails only when the kernel is out of memory or of the
/// user's epoll watches; the device is then deaf there, and that is said.
pub fn add(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.add(events) {
        say(format_args!("husk-vmm: watch descriptor {}: {error:?}", events.fd()));
    }
}

/// Changes what is watched of a descriptor that was added.
pub fn modify(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.modify(events) {
        say(format_args!("husk-vmm: change the watch of descriptor {}: {error:?}", events.fd()));
    }
}

/// Removes what was added, before it is closed.
pub fn remove(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.remove(events) {
        say(format_args!("husk-vmm: stop watching descriptor {}: {error:?}", events.fd()));
    }
}
