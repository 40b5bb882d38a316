//! x86-64: the layout of guest memory, and the state of a vCPU and of memory at
//! the kernel's 64-bit entry point.

pub mod boot;
pub mod cpuid;
pub mod interrupts;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod regs;
