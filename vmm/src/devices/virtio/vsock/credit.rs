//! Flow control of one connection (virtio 1.2 §5.10.6.3).
//!
//! Each side tells the other how large its receive buffer is and how many bytes
//! it has taken out of it since the beginning. The counters wrap at 2^32.

use super::packet::Header;

/// Bytes from the guest that a connection can hold while its unix socket takes
/// none.
pub const BUFFER_SIZE: u32 = 128 << 10;

/// The guest is sent an update when this many more bytes are free.
const UPDATE_STEP: u32 = BUFFER_SIZE / 4;

/// The guest sent more bytes than it was allowed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun;

/// The counters of one connection.
#[derive(Debug, Default)]
pub struct Credit {
    /// Bytes that the guest has sent.
    received: u32,
    /// The bytes of these that have left our buffer.
    forwarded: u32,
    /// The value of `forwarded` that was last sent to the guest.
    announced: u32,
    /// Bytes that were sent to the guest.
    sent: u32,
    /// The size of the guest's buffer.
    guest_size: u32,
    /// Bytes that have left the guest's buffer.
    guest_forwarded: u32,
}

impl Credit {
    /// Counts bytes that the guest sent.
    ///
    /// # Errors
    /// The peer must not have sent so many bytes.
    pub fn receive(&mut self, len: u32) -> Result<(), Overrun> {
        let held = self.received.wrapping_sub(self.forwarded);
        if len > BUFFER_SIZE.saturating_sub(held) {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Counts bytes that left our buffer.
    pub fn forward(&mut self, len: usize) {
        // At most BUFFER_SIZE.
        #[allow(clippy::cast_possible_truncation)]
        let len = len as u32;
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Counts all bytes in our buffer as having left it.
    pub const fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// Whether the guest should be sent an update of its credit.
    #[must_use]
    pub const fn update_is_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= UPDATE_STEP
    }

    /// Writes our counters into the header of a packet to the guest.
    pub fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER_SIZE.into();
        header.fwd_cnt = self.forwarded.into();
        self.announced = self.forwarded;
    }

    /// Reads the guest's counters from the header of a packet.
    pub fn learn(&mut self, header: &Header) {
        self.guest_size = header.buf_alloc.get();
        self.guest_forwarded = header.fwd_cnt.get();
    }

    /// How many bytes the guest can take now.
    #[must_use]
    pub const fn window(&self) -> u32 {
        let held = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_size.saturating_sub(held)
    }

    /// Counts bytes that are sent to the guest.
    pub fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_must_keep_to_its_credit() {
        let mut credit = Credit::default();
        credit.receive(BUFFER_SIZE - 1).unwrap();
        assert_eq!(credit.receive(2), Err(Overrun));
        assert_eq!(credit.receive(u32::MAX), Err(Overrun));
        credit.receive(1).unwrap();
        assert_eq!(credit.receive(1), Err(Overrun));
        credit.forward(10);
        credit.receive(10).unwrap();
    }

    #[test]
    fn an_update_is_due_before_the_guest_runs_dry() {
        let mut credit = Credit::default();
        credit.receive(BUFFER_SIZE).unwrap();
        credit.forward(UPDATE_STEP as usize - 1);
        assert!(!credit.update_is_due());
        credit.forward(1);
        assert!(credit.update_is_due());
        let mut header = Header::default();
        credit.stamp(&mut header);
        assert_eq!((header.buf_alloc.get(), header.fwd_cnt.get()), (BUFFER_SIZE, UPDATE_STEP));
        assert!(!credit.update_is_due());
    }

    #[test]
    fn the_window_survives_wrapping_and_lies() {
        let mut credit = Credit::default();
        let learn = |credit: &mut Credit, size: u32, forwarded: u32| {
            credit.learn(&Header { buf_alloc: size.into(), fwd_cnt: forwarded.into(), ..Header::default() });
        };
        assert_eq!(credit.window(), 0);
        learn(&mut credit, 100, 0);
        credit.send(60);
        assert_eq!(credit.window(), 40);
        learn(&mut credit, 50, 0);
        assert_eq!(credit.window(), 0);
        credit.send(u32::MAX - 50);
        learn(&mut credit, 100, u32::MAX);
        assert_eq!(credit.window(), 90);
        // More bytes taken out than were ever sent.
        learn(&mut credit, 100, 500);
        assert_eq!(credit.window(), 0);
    }
}
