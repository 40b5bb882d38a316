//! The file system device on an event loop of its own: its thread exists only
//! in machines with volumes, because moving file data takes time.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex};
use std::{io, thread};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use husk_vmm_api::words::say;
use vmm_sys_util::epoll::EventSet;

use super::device::Fs;
use crate::devices::virtio::watch::{self, FIRST_TOKEN, Source};

const SOCKET: u32 = FIRST_TOKEN;
const TIMER: u32 = FIRST_TOKEN + 1;

/// Bytes of the thread's stack. Only touched pages cost memory.
const STACK: usize = 128 * 1024;

/// Serves a device that has just been given its server, until the process ends.
///
/// # Errors
/// No thread or event loop can be made.
pub fn start(device: &Arc<Mutex<Fs>>) -> io::Result<()> {
    let mut events = EventManager::new().map_err(|error| io::Error::other(format!("{error:?}")))?;
    events.add_subscriber(Arc::clone(device));
    thread::Builder::new().name("husk-fs".into()).stack_size(STACK).spawn(move || {
        loop {
            match events.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
                Err(error) => {
                    say(format_args!(
                        "husk-vmm: failed to wait for events of the file system device: {error:?}"
                    ));
                    return;
                }
            }
        }
    })?;
    Ok(())
}

impl MutEventSubscriber for Fs {
    fn init(&mut self, ops: &mut EventOps) {
        self.watch.init(ops);
        if let Some(socket) = self.socket() {
            watch::add(ops, Events::with_data_raw(socket.as_raw_fd(), SOCKET, EventSet::IN));
        }
        if let Some(limit) = &self.limit {
            let timer = limit.timer().as_fd().as_raw_fd();
            watch::add(ops, Events::with_data_raw(timer, TIMER, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.watch.sync(ops);
        if self.watch.take(events) == Source::Other(TIMER)
            && let Some(limit) = &self.limit
        {
            // Waiting fails only if the timer was set again in the meantime.
            let _ = limit.timer().wait();
        }
        let stalled_before = self.stalled;
        let done = self.serve();
        if let Some(lost) = self.lost.take() {
            watch::remove(ops, Events::empty_raw(lost.as_raw_fd()));
        }
        if let Some(socket) = self.socket()
            && self.stalled != stalled_before
        {
            let events = if self.stalled { EventSet::IN | EventSet::OUT } else { EventSet::IN };
            watch::modify(ops, Events::with_data_raw(socket.as_raw_fd(), SOCKET, events));
        }
        if !done {
            self.watch.wake();
        }
    }
}
