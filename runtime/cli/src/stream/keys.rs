//! The keys that detach: Ctrl-P, Ctrl-Q, as docker has them.

const FIRST: u8 = 16;
const SECOND: u8 = 17;

/// Looks for the keys in what is typed.
#[derive(Debug, Default)]
pub(super) struct Keys {
    first_typed: bool,
}

impl Keys {
    /// Whether the keys were typed, one after the other.
    pub(super) fn detach(&mut self, typed: &[u8]) -> bool {
        typed.iter().any(|key| {
            let both = self.first_typed && *key == SECOND;
            self.first_typed = *key == FIRST;
            both
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_detach_also_when_they_come_one_by_one() {
        let mut keys = Keys::default();
        assert!(!keys.detach(b"ls\x10"));
        assert!(keys.detach(b"\x11"));
        let mut keys = Keys::default();
        assert!(!keys.detach(b"\x10x\x11\x11") && keys.detach(b"\x10\x11"));
    }
}
