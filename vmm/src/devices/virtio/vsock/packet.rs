//! The header of a packet (virtio 1.2 §5.10.6).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The context id of the host (virtio 1.2 §5.10.4).
pub const HOST_CID: u64 = 2;

/// The socket type of a stream.
pub const STREAM: u16 = 1;

/// Bytes of a header.
pub const HEADER_LEN: usize = size_of::<Header>();

/// Most bytes of payload that the device puts into one packet; Linux accepts no
/// larger ones.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// Flag of [`Op::Shutdown`]: the sender will receive nothing more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`Op::Shutdown`]: the sender will send nothing more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both flags.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `struct virtio_vsock_hdr`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// The sender: [`HOST_CID`] or the guest's context id.
    pub src_cid: U64,
    /// The receiver.
    pub dst_cid: U64,
    /// The sender's port.
    pub src_port: U32,
    /// The receiver's port.
    pub dst_port: U32,
    /// Bytes of payload behind the header.
    pub len: U32,
    /// The socket type, [`STREAM`].
    pub kind: U16,
    /// The purpose of the packet, an [`Op`].
    pub op: U16,
    /// The flags of [`Op::Shutdown`].
    pub flags: U32,
    /// The size of the sender's receive buffer for this connection.
    pub buf_alloc: U32,
    /// How many bytes the sender has taken out of that buffer so far.
    pub fwd_cnt: U32,
}

/// The purpose of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Refuses or ends a connection.
    Reset = 3,
    /// Ends one direction or both.
    Shutdown = 4,
    /// Carries payload.
    Data = 5,
    /// Says how much room the sender has.
    CreditUpdate = 6,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

impl Header {
    /// The purpose of the packet, if it is a known one.
    #[must_use]
    pub fn op(&self) -> Option<Op> {
        Some(match self.op.get() {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The port on the host.
    pub host: u32,
    /// The port in the guest.
    pub guest: u32,
}

impl Ports {
    /// Makes the header of a packet to the guest; the muxer adds the context
    /// ids.
    #[must_use]
    pub fn header(self, op: Op) -> Header {
        Header {
            src_port: self.host.into(),
            dst_port: self.guest.into(),
            kind: STREAM.into(),
            op: (op as u16).into(),
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_laid_out_as_the_specification_says() {
        let header = Header {
            src_cid: 2.into(),
            dst_cid: 0x0102_0304.into(),
            src_port: 5.into(),
            dst_port: 6.into(),
            len: 7.into(),
            kind: STREAM.into(),
            op: (Op::Shutdown as u16).into(),
            flags: SHUTDOWN_SEND.into(),
            buf_alloc: 8.into(),
            fwd_cnt: 9.into(),
        };
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = 2;
        bytes[8..12].copy_from_slice(&[4, 3, 2, 1]);
        (bytes[16], bytes[20], bytes[24], bytes[28], bytes[30]) = (5, 6, 7, 1, 4);
        (bytes[32], bytes[36], bytes[40]) = (2, 8, 9);
        assert_eq!(HEADER_LEN, 44);
        assert_eq!(header.as_bytes(), bytes);
        assert_eq!(header.op(), Some(Op::Shutdown));
        assert_eq!(Header { op: 8.into(), ..header }.op(), None);
    }
}
