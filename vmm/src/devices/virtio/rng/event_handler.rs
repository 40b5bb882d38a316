//! The entropy device on the event loop.

use std::os::fd::{AsFd, AsRawFd};

use event_manager::{EventOps, Events, MutEventSubscriber};
use husk_vmm_api::words::say;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};
use vmm_sys_util::epoll::EventSet;

use super::device::{PERIOD, Rng};
use crate::devices::virtio::watch::{self, FIRST_TOKEN, Source};

const TIMER: u32 = FIRST_TOKEN;

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        self.watch.init(ops);
        let timer = self.timer.as_fd().as_raw_fd();
        watch::add(ops, Events::with_data_raw(timer, TIMER, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.watch.sync(ops);
        if self.watch.take(events) == Source::Other(TIMER) {
            // Waiting fails only if the timer was set again in the meantime.
            let _ = self.timer.wait();
        }
        if !self.serve() {
            let next_period = Expiration::OneShot(TimeSpec::from_duration(PERIOD));
            if let Err(error) = self.timer.set(next_period, TimerSetTimeFlags::empty()) {
                say(format_args!("husk-vmm: failed to set the timer of the rng device: {error}"));
            }
        }
    }
}
