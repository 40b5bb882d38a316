//! The vsock device on the event loop.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use husk_vmm_api::words::say;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};
use vmm_sys_util::epoll::EventSet;

use super::device::Vsock;
use super::muxer::{Change, LIMIT_TIMER, TIMER};
use crate::devices::virtio::watch::{self, Source};

/// How often deadlines are checked, while there are some.
const TICK: Duration = Duration::from_millis(250);

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        self.watch.init(ops);
        watch::add(ops, Events::with_data_raw(self.timer.as_fd().as_raw_fd(), TIMER, EventSet::IN));
        if let Some(limit) = &self.limit {
            let timer = limit.timer().as_fd().as_raw_fd();
            watch::add(ops, Events::with_data_raw(timer, LIMIT_TIMER, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.watch.sync(ops) {
            self.muxer.set_open(self.is_active());
        }
        match self.watch.take(events) {
            Source::Other(TIMER) => {
                // Waiting fails only if the timer was stopped in the meantime.
                let _ = self.timer.wait();
                self.muxer.tick(Instant::now());
            }
            Source::Other(LIMIT_TIMER) => {
                if let Some(limit) = &self.limit {
                    // Waiting fails only if the timer was set again in the meantime.
                    let _ = limit.timer().wait();
                }
            }
            Source::Other(token) => self.muxer.host_event(token, events.event_set()),
            Source::Wake | Source::Queue(_) => {}
        }
        self.serve();
        self.set_timer();
        for change in self.muxer.take_changes() {
            match change {
                Change::Add(fd, token, set) => watch::add(ops, Events::with_data_raw(fd, token, set)),
                Change::Modify(fd, token, set) => watch::modify(ops, Events::with_data_raw(fd, token, set)),
                Change::Remove(fd) => watch::remove(ops, Events::empty_raw(fd)),
                Change::Close(socket) => watch::remove(ops, Events::empty(&socket)),
            }
        }
    }
}

impl Vsock {
    fn set_timer(&mut self) {
        let wanted = self.muxer.needs_tick();
        if wanted == self.timer_is_set {
            return;
        }
        let result = if wanted {
            let tick = Expiration::Interval(TimeSpec::from_duration(TICK));
            self.timer.set(tick, TimerSetTimeFlags::empty())
        } else {
            self.timer.unset()
        };
        match result {
            Ok(()) => self.timer_is_set = wanted,
            Err(error) => say(format_args!("husk-vmm: failed to set the timer of the vsock device: {error}")),
        }
    }
}
