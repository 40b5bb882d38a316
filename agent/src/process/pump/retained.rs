//! The output of a container that its client has not confirmed.

use std::collections::VecDeque;

/// Bytes of a stream, numbered from its beginning: those that were sent to the present
/// client and are not confirmed, and behind them those that are still to be sent.
#[derive(Debug, Default)]
pub struct Retained {
    bytes: VecDeque<u8>,
    /// How many of the stream's bytes were confirmed: the number of the first in `bytes`.
    confirmed: u64,
    /// How many of `bytes` the present client was sent.
    sent: usize,
}

impl Retained {
    /// Most bytes that wait; a little more than what a client may leave unconfirmed
    /// because its line has not ended.
    const MAX_WAITING: usize = 128 * 1024;

    /// Whether there is nothing that waits to be sent or confirmed.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether more may be read from the process.
    pub fn has_room(&self) -> bool {
        self.bytes.len() < Self::MAX_WAITING
    }

    /// Takes what was read from the process.
    pub fn push(&mut self, chunk: &[u8]) {
        self.bytes.extend(chunk);
    }

    /// Bytes to be sent next, as many as lie together.
    pub fn unsent(&self) -> &[u8] {
        let (front, back) = self.bytes.as_slices();
        match front.get(self.sent..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => back.get(self.sent.saturating_sub(front.len())..).unwrap_or_default(),
        }
    }

    /// Whether the present client was sent everything.
    pub fn all_sent(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// The present client was sent so many bytes more.
    pub fn advance(&mut self, count: usize) {
        self.sent = self.bytes.len().min(self.sent.saturating_add(count));
    }

    /// Forgets all bytes below the number `offset`. A number of bytes that were not sent,
    /// or were confirmed before, changes nothing: false.
    pub fn confirm(&mut self, offset: u64) -> bool {
        let count = offset.checked_sub(self.confirmed).and_then(|count| usize::try_from(count).ok());
        let Some(count) = count.filter(|count| (1..=self.sent).contains(count)) else { return false };
        self.drop_first(count);
        self.sent -= count;
        true
    }

    /// Forgets all bytes that were sent: the present client confirms nothing.
    pub fn confirm_sent(&mut self) {
        self.drop_first(self.sent);
        self.sent = 0;
    }

    /// Begins anew for another client, which has all bytes below the number `from`.
    /// Returns the number of the first byte that is sent to it.
    pub fn begin(&mut self, from: u64) -> u64 {
        // Bytes that this client has count as confirmed by the one before.
        self.sent = self.bytes.len();
        self.confirm(from);
        self.sent = 0;
        self.confirmed
    }

    fn drop_first(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
        self.confirmed = self.confirmed.saturating_add(count as u64);
        if self.bytes.is_empty() {
            // A silent stream holds no memory.
            self.bytes = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_number_that_cannot_be_confirmed_changes_nothing() {
        let mut retained = Retained::default();
        retained.push(b"0123456789");
        retained.advance(4);
        for offset in [0, 5, 10, u64::MAX] {
            assert!(!retained.confirm(offset), "{offset}");
        }
        assert!(retained.confirm(3) && !retained.confirm(3) && !retained.confirm(2));
        assert_eq!(retained.unsent(), b"456789");
    }

    #[test]
    fn another_client_gets_what_it_does_not_have() {
        for (from, start) in [(0, 2), (2, 2), (3, 3), (6, 6), (7, 2), (u64::MAX, 2)] {
            let mut retained = Retained::default();
            retained.push(b"012345");
            retained.advance(5);
            assert!(retained.confirm(2));
            assert_eq!(retained.begin(from), start, "{from}");
            assert_eq!(retained.unsent(), &b"012345"[start as usize..], "{from}");
        }
    }

    proptest! {
        /// However pushes, sends and confirmations come, what is sent is the stream.
        #[test]
        fn what_is_sent_is_the_stream(steps in prop::collection::vec((0..4u8, 0..300usize), 0..200)) {
            let (mut retained, mut pushed, mut client) = (Retained::default(), Vec::<u8>::new(), Vec::new());
            for (step, count) in steps {
                match step {
                    0 => {
                        let chunk: Vec<u8> = (pushed.len()..pushed.len() + count).map(|n| n as u8).collect();
                        retained.push(&chunk);
                        pushed.extend(chunk);
                    }
                    1 => {
                        let next = retained.unsent();
                        let next = &next[..count.min(next.len())];
                        client.extend_from_slice(next);
                        let sent = next.len();
                        retained.advance(sent);
                    }
                    2 => {
                        retained.confirm(client.len().saturating_sub(count) as u64);
                    }
                    _ => {
                        let has = client.len().saturating_sub(count) as u64;
                        let start = retained.begin(has);
                        prop_assert!(start >= has || retained.confirmed == start);
                        client.truncate(start as usize);
                    }
                }
                prop_assert!(pushed.starts_with(&client));
            }
        }
    }
}
