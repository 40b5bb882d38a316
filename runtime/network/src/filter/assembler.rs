//! Classic BPF programs (Linux, `Documentation/networking/filter.rst`), put
//! together with labels in place of counted jumps.
//!
//! A conditional jump reaches 255 instructions and an unconditional one any
//! number, so every conditional jump here steps over an unconditional one.

use libc::sock_filter;

/// The longest program that the kernel takes (`BPF_MAXINSNS`).
pub const MAX_LENGTH: usize = 4096;

/// A load that tells whether the frame had a VLAN tag (`SKF_AD_VLAN_TAG_PRESENT`).
pub const VLAN_TAG_PRESENT: u32 = (libc::SKF_AD_OFF + 48).cast_unsigned();

/// The bytes that a load takes, in network byte order.
#[derive(Clone, Copy, Debug)]
pub enum Size {
    /// Four bytes.
    Word,
    /// Two bytes.
    Half,
    /// One byte.
    Byte,
}

/// The place of a load. A load beyond the frame's end ends the program with 0.
#[derive(Clone, Copy, Debug)]
pub enum At {
    /// Bytes from the frame's start.
    Start(u32),
    /// Bytes from where the index register points.
    Index(u32),
}

/// A place that jumps lead to, further down in the program.
#[derive(Clone, Copy, Debug)]
pub struct Label(usize);

/// A program in the making.
#[derive(Debug, Default)]
pub struct Assembler {
    code: Vec<sock_filter>,
    /// The unconditional jumps to each label.
    jumps: Vec<Vec<usize>>,
}

impl Assembler {
    /// A label that has no place yet.
    pub fn label(&mut self) -> Label {
        self.jumps.push(Vec::new());
        Label(self.jumps.len().saturating_sub(1))
    }

    /// Gives a label its place: the next instruction.
    pub fn place(&mut self, label: Label) {
        let here = self.code.len();
        for jump in self.jumps.get_mut(label.0).map(std::mem::take).unwrap_or_default() {
            if let Some(instruction) = self.code.get_mut(jump) {
                let distance = here.saturating_sub(jump).saturating_sub(1);
                instruction.k = u32::try_from(distance).unwrap_or(u32::MAX);
            }
        }
    }

    fn push(&mut self, code: u32, jt: u8, jf: u8, k: u32) {
        // The codes are constants of `linux/bpf_common.h`, all below 0x100.
        self.code.push(sock_filter { code: code as u16, jt, jf, k });
    }

    /// Loads into the accumulator.
    pub fn load(&mut self, size: Size, at: At) {
        let size = match size {
            Size::Word => libc::BPF_W,
            Size::Half => libc::BPF_H,
            Size::Byte => libc::BPF_B,
        };
        let (mode, offset) = match at {
            At::Start(offset) => (libc::BPF_ABS, offset),
            At::Index(offset) => (libc::BPF_IND, offset),
        };
        self.push(libc::BPF_LD | size | mode, 0, 0, offset);
    }

    /// Keeps the bits of the accumulator that are in `mask`.
    pub fn and(&mut self, mask: u32) {
        self.push(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, mask);
    }

    /// Adds to the accumulator.
    pub fn add(&mut self, number: u32) {
        self.push(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K, 0, 0, number);
    }

    /// Adds the index register to the accumulator.
    pub fn add_index(&mut self) {
        self.push(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X, 0, 0, 0);
    }

    /// Shifts the accumulator to the left.
    pub fn shift_left(&mut self, bits: u32) {
        self.push(libc::BPF_ALU | libc::BPF_LSH | libc::BPF_K, 0, 0, bits);
    }

    /// Puts the index register into the accumulator.
    pub fn load_index(&mut self) {
        self.push(libc::BPF_MISC | libc::BPF_TXA, 0, 0, 0);
    }

    /// Puts a number into the index register.
    pub fn set_index(&mut self, number: u32) {
        self.push(libc::BPF_LDX | libc::BPF_IMM, 0, 0, number);
    }

    /// Puts the accumulator into the one word of memory that is used.
    pub fn store(&mut self) {
        self.push(libc::BPF_ST, 0, 0, 0);
    }

    /// Puts that word into the index register.
    pub fn set_index_from_store(&mut self) {
        self.push(libc::BPF_LDX | libc::BPF_MEM, 0, 0, 0);
    }

    /// Goes on at `to`.
    pub fn jump(&mut self, to: Label) {
        let here = self.code.len();
        if let Some(jumps) = self.jumps.get_mut(to.0) {
            jumps.push(here);
        }
        self.push(libc::BPF_JMP | libc::BPF_JA, 0, 0, 0);
    }

    /// Goes on at `to` if the accumulator is `value`.
    pub fn jump_if(&mut self, value: u32, to: Label) {
        self.push(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, value);
        self.jump(to);
    }

    /// Goes on at `to` if the accumulator is anything but `value`.
    pub fn jump_unless(&mut self, value: u32, to: Label) {
        self.push(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, value);
        self.jump(to);
    }

    /// Ends the program with an answer.
    pub fn answer(&mut self, answer: u32) {
        self.push(libc::BPF_RET | libc::BPF_K, 0, 0, answer);
    }

    /// The program.
    pub fn finish(self) -> Vec<sock_filter> {
        self.code
    }
}
