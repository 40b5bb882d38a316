//! A bounded set whose items have small numbers as names, for the tokens of the
//! event loop.

#[derive(Debug)]
pub struct Slab<T> {
    slots: Vec<Option<T>>,
    used: usize,
    limit: usize,
}

impl<T> Slab<T> {
    pub const fn new(limit: usize) -> Self {
        Self { slots: Vec::new(), used: 0, limit }
    }

    pub const fn len(&self) -> usize {
        self.used
    }

    pub const fn is_full(&self) -> bool {
        self.used >= self.limit
    }

    /// Adds an item and returns its name, or returns the item if there is no
    /// room.
    pub fn insert(&mut self, value: T) -> Result<usize, T> {
        if self.is_full() {
            return Err(value);
        }
        self.used += 1;
        if let Some(name) = self.slots.iter().position(Option::is_none)
            && let Some(slot) = self.slots.get_mut(name)
        {
            *slot = Some(value);
            return Ok(name);
        }
        self.slots.push(Some(value));
        Ok(self.slots.len() - 1)
    }

    pub fn get_mut(&mut self, name: usize) -> Option<&mut T> {
        self.slots.get_mut(name)?.as_mut()
    }

    pub fn remove(&mut self, name: usize) -> Option<T> {
        let value = self.slots.get_mut(name)?.take()?;
        self.used -= 1;
        Some(value)
    }

    /// The names in use.
    pub fn names(&self) -> Vec<usize> {
        (0..).zip(&self.slots).filter_map(|(name, slot)| slot.as_ref().map(|_| name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_reused_and_bounded() {
        let mut slab = Slab::new(2);
        assert_eq!((slab.insert('a'), slab.insert('b'), slab.insert('c')), (Ok(0), Ok(1), Err('c')));
        assert_eq!((slab.remove(0), slab.remove(0)), (Some('a'), None));
        assert_eq!((slab.insert('d'), slab.names(), slab.len()), (Ok(0), vec![0, 1], 2));
        assert_eq!(slab.get_mut(2), None);
    }
}
