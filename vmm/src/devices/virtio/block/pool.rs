//! Threads for disk I/O, shared by all block devices of a machine.
//!
//! They wait together on one epoll instance for the devices' notifications, so
//! that a notification wakes the thread that does the work, without the event
//! loop in between. While nothing blocks there is one thread. A thread that is
//! about to wait for a file first makes sure that another one listens. Threads
//! that were idle for long end, because each costs a pod memory.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, Weak};
use std::thread;

use nix::sys::timerfd::TimerFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::Block;
use crate::lock;

/// Most threads, and so most requests that are in progress at a time.
const MAX_THREADS: usize = 4;
/// Milliseconds after which an idle thread ends, unless it is the last one.
const IDLE_MILLIS: i32 = 10_000;
/// Bytes of a thread's stack. Only touched pages cost memory.
const STACK: usize = 128 * 1024;

/// The threads of one machine. They end soon after the last owner is gone.
#[derive(Clone)]
pub struct IoPool(Arc<Shared>);

struct Shared {
    epoll: Epoll,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    devices: HashMap<u64, Weak<Mutex<Block>>>,
    next_token: u64,
    threads: usize,
    idle: usize,
}

/// A device's registration with the pool.
#[derive(Debug)]
pub struct Watch {
    token: u64,
}

impl IoPool {
    /// Makes a pool without threads.
    ///
    /// # Errors
    /// No epoll instance can be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared { epoll: Epoll::new()?, state: Mutex::default() })))
    }

    /// Serves `device` whenever `notification` is written to, and when one of its timers
    /// has ended.
    ///
    /// # Errors
    /// The notification cannot be watched, or no thread can be made.
    pub(super) fn watch(
        &self,
        device: Weak<Mutex<Block>>,
        notification: &EventFd,
        timers: &[&TimerFd],
    ) -> io::Result<Watch> {
        let mut state = lock(&self.0.state);
        let token = state.next_token;
        state.next_token += 1;
        state.devices.insert(token, device);
        // Edge-triggered: each notification wakes one thread, and none has to
        // read the counter.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        let add = |fd: RawFd| self.0.epoll.ctl(ControlOperation::Add, fd, event);
        let added = add(notification.as_raw_fd())
            .and_then(|()| timers.iter().try_for_each(|timer| add(timer.as_fd().as_raw_fd())))
            .and_then(|()| if state.threads == 0 { self.spawn(&mut state) } else { Ok(()) });
        if added.is_err() {
            state.devices.remove(&token);
        }
        added.map(|()| Watch { token })
    }

    /// Stops serving a device.
    pub(super) fn unwatch(&self, watch: &Watch, notification: &EventFd, timers: &[&TimerFd]) {
        lock(&self.0.state).devices.remove(&watch.token);
        // Each descriptor is watched for as long as the device's `Watch` lives.
        let timers = timers.iter().map(|timer| timer.as_fd().as_raw_fd());
        for fd in timers.chain([notification.as_raw_fd()]) {
            let _ = self.0.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    /// Makes sure that a thread listens while the caller waits for a file.
    pub(super) fn ensure_listener(&self) {
        let mut state = lock(&self.0.state);
        if state.idle == 0 && state.threads < MAX_THREADS {
            // If no thread can be made, requests wait for each other.
            let _ = self.spawn(&mut state);
        }
    }

    /// Whether a thread waits for work.
    pub(super) fn has_idle(&self) -> bool {
        lock(&self.0.state).idle > 0
    }

    fn spawn(&self, state: &mut State) -> io::Result<()> {
        let shared = Arc::downgrade(&self.0);
        thread::Builder::new().name("husk-io".into()).stack_size(STACK).spawn(move || work(&shared))?;
        state.threads += 1;
        // The new thread counts as idle from now on, so that no third one is made.
        state.idle += 1;
        Ok(())
    }
}

fn work(pool: &Weak<Shared>) {
    loop {
        let Some(pool) = pool.upgrade().map(IoPool) else { return };
        let mut events = [EpollEvent::default()];
        let count = match pool.0.epoll.wait(IDLE_MILLIS, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.unwrap_or(0),
        };
        let device = {
            let mut state = lock(&pool.0.state);
            let last = state.threads == 1;
            if count == 0 && !last {
                state.threads -= 1;
                state.idle -= 1;
                return;
            }
            let [event] = events;
            let device = state.devices.get(&event.data()).filter(|_| count > 0).and_then(Weak::upgrade);
            if device.is_some() {
                state.idle -= 1;
            }
            device
        };
        if let Some(device) = device {
            serve(&device, &pool);
            lock(&pool.0.state).idle += 1;
        }
    }
}

/// Executes the device's requests until there are none, on the caller's thread.
#[cfg(feature = "fuzzing")]
pub fn serve_all(device: &Mutex<Block>, pool: &IoPool) {
    serve(device, pool);
}

/// Executes the device's requests until there are none.
fn serve(device: &Mutex<Block>, pool: &IoPool) {
    loop {
        let Some(job) = lock(device).next_job() else { return };
        let done = job.run(&|| pool.ensure_listener());
        lock(device).complete(&done);
    }
}
