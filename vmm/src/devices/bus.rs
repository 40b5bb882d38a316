//! A bus: finds the device that an access of the guest is for. A machine has
//! one for memory-mapped registers and one for I/O ports.

use std::sync::{Arc, Mutex};

use crate::lock;

/// A device with registers. Offsets count from the start of its range, and
/// accesses never reach beyond its end.
pub trait BusDevice: Send {
    /// Handles a read of the guest. `data` holds ones, as on a bus without a
    /// device.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Handles a write of the guest.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Two devices would have the same addresses.
#[derive(Debug, thiserror::Error)]
#[error("devices overlap at address {0:#x}")]
pub struct Overlap(u64);

struct Range {
    start: u64,
    length: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// The devices, by address.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `start`, without overlaps.
    ranges: Vec<Range>,
}

impl Bus {
    /// Adds `device` at `length` addresses from `start` on.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn insert(
        &mut self,
        start: u64,
        length: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), Overlap> {
        let place = self.ranges.partition_point(|range| range.start < start);
        let before = place.checked_sub(1).and_then(|i| self.ranges.get(i));
        let overlaps_before = before.is_some_and(|range| range.start + range.length > start);
        let overlaps_after = self.ranges.get(place).is_some_and(|range| start + length > range.start);
        if overlaps_before || overlaps_after {
            return Err(Overlap(start));
        }
        self.ranges.insert(place, Range { start, length, device });
        Ok(())
    }

    /// Passes a read of the guest to its device; the result is all ones where
    /// no device is.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            lock(device).read(offset, data);
        }
    }

    /// Passes a write of the guest to its device; it is lost where no device
    /// is.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            lock(device).write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&Mutex<dyn BusDevice>, u64)> {
        let after = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        let offset = address - range.start;
        let inside = offset.checked_add(length as u64)? <= range.length;
        inside.then_some((&*range.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Register(u64, Vec<u8>);

    impl BusDevice for Register {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0 = offset;
            self.1 = data.to_vec();
        }
    }

    #[test]
    fn accesses_reach_the_device_at_their_address_only() {
        let mut bus = Bus::default();
        let (low, high) =
            (Arc::new(Mutex::new(Register::default())), Arc::new(Mutex::new(Register::default())));
        bus.insert(0x2000, 0x1000, high.clone()).unwrap();
        bus.insert(0x1000, 0x1000, low.clone()).unwrap();
        bus.write(0x1ff8, &[1, 2]);
        assert_eq!((low.lock().unwrap().0, high.lock().unwrap().0), (0xff8, 0));
        assert_eq!(low.lock().unwrap().1, [1, 2]);
        let mut data = [0; 2];
        bus.read(0x2003, &mut data);
        assert_eq!(data, [3, 3]);
    }

    #[test]
    fn nothing_answers_outside_and_across() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x1000, Arc::new(Mutex::new(Register::default()))).unwrap();
        for address in [0, 0xfff, 0x1ffd, 0x2000, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            bus.write(address, &data);
        }
    }

    #[test]
    fn devices_may_touch_and_not_overlap() {
        let mut bus = Bus::default();
        let device = || Arc::new(Mutex::new(Register::default()));
        bus.insert(0x1000, 0x1000, device()).unwrap();
        bus.insert(0x2000, 0x1000, device()).unwrap();
        assert!(bus.insert(0x1800, 0x10, device()).is_err());
        assert!(bus.insert(0x0, 0x1001, device()).is_err());
        assert!(bus.insert(0x2fff, 0x1, device()).is_err());
        bus.insert(0x0, 0x1000, device()).unwrap();
    }
}
