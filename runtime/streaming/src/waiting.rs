//! Connections whose clients have not brought a token yet.
//!
//! Anybody who reaches the server can open one and say nothing, so they are
//! counted apart from the sessions of clients that had a token. When there are
//! too many, the one that has waited longest is closed: a client sends its
//! request at once, and one that does not is the likeliest to send none.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use husk_base::lock;
use tokio_util::sync::CancellationToken;

/// Most of them at a time.
pub const MAX_WAITING: usize = 256;

/// The connections, the one that has waited longest first.
#[derive(Debug, Default)]
pub struct Waiting(Mutex<VecDeque<CancellationToken>>);

impl Waiting {
    /// Takes a connection in, and has the oldest closed if there are too many.
    pub fn enter(self: &Arc<Self>) -> Place {
        let evicted = CancellationToken::new();
        let mut places = lock(&self.0);
        places.push_back(evicted.clone());
        if places.len() > MAX_WAITING
            && let Some(oldest) = places.pop_front()
        {
            oldest.cancel();
        }
        Place { waiting: self.clone(), evicted }
    }
}

/// The place of one connection, until it is dropped.
#[derive(Debug)]
pub struct Place {
    waiting: Arc<Waiting>,
    evicted: CancellationToken,
}

impl Place {
    /// Cancelled when the connection is to be closed.
    pub fn evicted(&self) -> CancellationToken {
        self.evicted.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.waiting.0).retain(|place| *place != self.evicted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_and_those_that_have_left_do_not_count() {
        let waiting = Arc::<Waiting>::default();
        let left = waiting.enter();
        let token = left.evicted();
        drop(left);
        let mut places: Vec<_> = (0..MAX_WAITING).map(|_| waiting.enter()).collect();
        assert!(places.iter().all(|place| !place.evicted().is_cancelled()));
        places.push(waiting.enter());
        let evicted: Vec<_> = places.iter().map(|place| place.evicted().is_cancelled()).collect();
        assert!(evicted[0] && !evicted[1..].contains(&true));
        assert!(!token.is_cancelled());
        drop(places);
        assert!(lock(&waiting.0).is_empty());
    }
}
