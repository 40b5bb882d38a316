//! Parses a request from a descriptor chain, which a hostile guest wrote.
//!
//! The readable part begins with a header of 16 bytes, and the writable part
//! ends with the status byte. The driver may cut both into descriptors as it
//! likes (virtio 1.2 §2.7.4.1).

use virtio_bindings::virtio_blk as vb;
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::devices::virtio::buffers::MAX_SEGMENTS;

/// Bytes of `struct virtio_blk_req` before its data: type, reserved, sector.
const HEADER: u32 = 16;

/// The chain is not a request. It is returned without an answer, because it has
/// no status byte, or the status byte cannot be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A descriptor points outside of guest memory.
    #[error("a buffer lies outside of memory")]
    OutsideMemory,
    /// The chain has more than [`MAX_SEGMENTS`] descriptors; drivers are
    /// offered far fewer.
    #[error("it has more than {MAX_SEGMENTS} buffers")]
    TooLong,
    /// A readable descriptor follows a writable one (§2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// The chain has fewer than 16 readable bytes.
    #[error("the header is incomplete")]
    NoHeader,
    /// The chain has no writable byte for the status.
    #[error("there is no room for the status")]
    NoStatus,
}

/// A piece of guest memory, checked to lie within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// The address of the first byte.
    pub address: GuestAddress,
    /// Bytes, more than zero.
    pub length: u32,
}

/// The operation that the driver requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read from disk to memory, from this sector on.
    Read(u64),
    /// Write from memory to disk, from this sector on.
    Write(u64),
    /// Make all completed writes durable.
    Flush,
    /// Return the serial number.
    GetId,
    /// Discard the ranges that the data lists.
    Discard,
    /// Zero the ranges that the data lists.
    WriteZeroes,
    /// An operation that the device does not support.
    Unsupported,
}

/// A parsed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The head of the chain, which names it when it is returned.
    pub head: u16,
    /// The requested operation.
    pub operation: Operation,
    /// The data that the driver gives: readable buffers behind the header.
    pub input: Vec<Buffer>,
    /// The room for data that the driver gets: writable buffers before the
    /// status.
    pub output: Vec<Buffer>,
    /// The address of the status byte.
    pub status: GuestAddress,
}

impl Request {
    /// Parses the request at the head of `chain`.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(chain: DescriptorChain<&GuestMemoryMmap>) -> Result<Self, Malformed> {
        let memory = chain.memory();
        let head = chain.head_index();
        let (mut input, mut output) = (Vec::new(), Vec::new());
        for (index, descriptor) in chain.clone().enumerate() {
            if index == MAX_SEGMENTS {
                return Err(Malformed::TooLong);
            }
            if descriptor.len() == 0 {
                continue;
            }
            let buffer = Buffer { address: descriptor.addr(), length: descriptor.len() };
            if !GuestMemoryBackend::check_range(memory, buffer.address, buffer.length as usize) {
                return Err(Malformed::OutsideMemory);
            }
            if descriptor.is_write_only() {
                output.push(buffer);
            } else if output.is_empty() {
                input.push(buffer);
            } else {
                return Err(Malformed::Order);
            }
        }
        let header = take_header(&mut input, memory)?;
        let status = take_status(&mut output)?;
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        let operation = match kind {
            vb::VIRTIO_BLK_T_IN => Operation::Read(sector),
            vb::VIRTIO_BLK_T_OUT => Operation::Write(sector),
            vb::VIRTIO_BLK_T_FLUSH => Operation::Flush,
            vb::VIRTIO_BLK_T_GET_ID => Operation::GetId,
            vb::VIRTIO_BLK_T_DISCARD => Operation::Discard,
            vb::VIRTIO_BLK_T_WRITE_ZEROES => Operation::WriteZeroes,
            _ => Operation::Unsupported,
        };
        Ok(Self { head, operation, input, output, status })
    }
}

/// Cuts the header off the front of the readable buffers.
fn take_header(input: &mut Vec<Buffer>, memory: &GuestMemoryMmap) -> Result<u128, Malformed> {
    let mut header = [0u8; HEADER as usize];
    let mut filled = 0u32;
    let mut used = 0;
    for buffer in input.iter_mut() {
        let part = buffer.length.min(HEADER - filled);
        let target = header.get_mut(filled as usize..(filled + part) as usize).ok_or(Malformed::NoHeader)?;
        memory.read_slice(target, buffer.address).map_err(|_| Malformed::OutsideMemory)?;
        filled += part;
        buffer.address = buffer.address.unchecked_add(part.into());
        buffer.length -= part;
        if buffer.length > 0 {
            break;
        }
        used += 1;
        if filled == HEADER {
            break;
        }
    }
    if filled < HEADER {
        return Err(Malformed::NoHeader);
    }
    input.drain(..used);
    Ok(u128::from_le_bytes(header))
}

/// Cuts the status byte off the end of the writable buffers.
fn take_status(output: &mut Vec<Buffer>) -> Result<GuestAddress, Malformed> {
    let last = output.last_mut().ok_or(Malformed::NoStatus)?;
    last.length -= 1;
    let (address, length) = (last.address, last.length);
    if length == 0 {
        output.pop();
    }
    Ok(address.unchecked_add(length.into()))
}

/// The bytes of all `buffers` together.
#[must_use]
pub fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.length)).sum()
}
