//! The persistent memory device on the event loop.

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::device::Pmem;

impl MutEventSubscriber for Pmem {
    fn init(&mut self, ops: &mut EventOps) {
        self.watch.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.watch.sync(ops);
        self.watch.take(events);
        self.serve();
    }
}
