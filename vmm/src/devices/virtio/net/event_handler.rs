//! The device on the event loop.

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::device::Net;
use crate::devices::virtio::watch::{self, FIRST_TOKEN, Source};

const TAP: u32 = FIRST_TOKEN;

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        self.watch.init(ops);
        watch::add(ops, Events::with_data(&self.tap, TAP, EventSet::IN | EventSet::EDGE_TRIGGERED));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.watch.sync(ops);
        if self.watch.take(events) == Source::Other(TAP) {
            self.tap_is_readable();
        }
        self.serve();
    }
}
