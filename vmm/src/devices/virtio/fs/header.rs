//! The headers of FUSE messages (Linux `include/uapi/linux/fuse.h`). The device
//! reads nothing else of a message.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The opcodes that the device knows (`enum fuse_opcode`).
const FORGET: u32 = 2;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// Bytes of an [`InHeader`].
pub const IN_HEADER: usize = size_of::<InHeader>();
/// Bytes of an [`OutHeader`].
pub const OUT_HEADER: usize = size_of::<OutHeader>();

/// `struct fuse_in_header`, at the start of every request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InHeader {
    /// Bytes of the request, including this header.
    pub len: u32,
    /// The kind of request.
    pub opcode: u32,
    /// The number by which the answer names the request.
    pub unique: u64,
    rest: [u64; 3],
}

/// `struct fuse_out_header`, at the start of every answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OutHeader {
    /// Bytes of the answer, including this header.
    pub len: u32,
    /// 0, or a negated errno.
    pub error: i32,
    /// The number of the request.
    pub unique: u64,
}

impl InHeader {
    /// Whether the server answers such a request at all.
    #[must_use]
    pub const fn has_answer(&self) -> bool {
        !matches!(self.opcode, FORGET | INTERRUPT | BATCH_FORGET)
    }

    /// Whether the request begins a session (`FUSE_INIT`).
    #[must_use]
    pub const fn is_init(&self) -> bool {
        self.opcode == INIT
    }

    /// Whether the request interrupts another one, which it names by the
    /// guest's number (`FUSE_INTERRUPT`).
    #[must_use]
    pub const fn is_interrupt(&self) -> bool {
        self.opcode == INTERRUPT
    }
}

impl OutHeader {
    /// An answer that is an error.
    #[must_use]
    pub const fn error(unique: u64, errno: i32) -> Self {
        Self { len: OUT_HEADER as u32, error: -errno, unique }
    }
}
