//! Requests that wait for the server's answer.

use std::collections::HashMap;

use vm_memory::GuestAddress;

/// Most requests in flight. A well-behaved driver is limited by its
/// descriptors; this bounds one that makes the same chain available again and
/// again.
pub const MAX_IN_FLIGHT: usize = 256;

/// A request that was sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Pending {
    /// The queue that it came from.
    pub queue: usize,
    /// The head of its descriptor chain.
    pub head: u16,
    /// The guest's number of the request.
    pub unique: u64,
    /// The guest memory for the answer, checked to lie in guest memory.
    pub output: Vec<(GuestAddress, usize)>,
}

/// The requests in flight, by the number under which the server knows each. Numbers are
/// not used again, so a late answer to a request from before a reset matches nothing.
#[derive(Debug, Default)]
pub struct InFlight {
    pending: HashMap<u64, Pending>,
    last: u64,
}

impl InFlight {
    /// The number of the next request.
    #[must_use]
    pub const fn next_number(&self) -> u64 {
        self.last.wrapping_add(1)
    }

    /// Adds a request that was sent under [`Self::next_number`].
    pub fn add(&mut self, pending: Pending) {
        self.last = self.next_number();
        self.pending.insert(self.last, pending);
    }

    /// Uses a number up for a request without answer.
    pub const fn skip_number(&mut self) {
        self.last = self.next_number();
    }

    /// The request with this number, if it waits.
    pub fn get(&self, number: u64) -> Option<&Pending> {
        self.pending.get(&number)
    }

    /// Removes a request whose answer has come.
    pub fn take(&mut self, number: u64) -> Option<Pending> {
        self.pending.remove(&number)
    }

    /// Removes all requests, because none will be answered any more.
    pub fn take_all(&mut self) -> Vec<Pending> {
        self.pending.drain().map(|(_, pending)| pending).collect()
    }

    /// Whether no more requests can be sent now.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.pending.len() >= MAX_IN_FLIGHT
    }
}
