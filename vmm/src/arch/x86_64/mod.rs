//! x86-64: how guest memory is laid out, and what a vCPU and the memory hold
//! when the kernel's 64-bit entry point is jumped to.

pub mod boot;
pub mod cpuid;
pub mod interrupts;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod regs;
