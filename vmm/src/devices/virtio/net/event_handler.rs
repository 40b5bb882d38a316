//! The network device on the event loop.

use std::os::fd::{AsFd, AsRawFd};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::device::Net;
use crate::devices::virtio::watch::{self, FIRST_TOKEN, Source};

const TAP: u32 = FIRST_TOKEN;
const TIMER: u32 = FIRST_TOKEN + 1;

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        self.watch.init(ops);
        watch::add(ops, Events::with_data(&self.tap, TAP, EventSet::IN | EventSet::EDGE_TRIGGERED));
        if let Some(timer) = &self.limits.timer {
            watch::add(ops, Events::with_data_raw(timer.as_fd().as_raw_fd(), TIMER, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.watch.sync(ops);
        match self.watch.take(events) {
            Source::Other(TAP) => self.tap_is_readable(),
            Source::Other(TIMER) => {
                if let Some(timer) = &self.limits.timer {
                    // Waiting fails only if the timer was set again in the meantime.
                    let _ = timer.wait();
                }
            }
            _ => {}
        }
        self.serve();
    }
}
