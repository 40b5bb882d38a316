//! A saved machine: its state as versioned plain data.
//!
//! ```text
//! file      = header, payload                      format.rs
//! payload   = machine state, in bitcode             machine.rs
//!   vm      = interrupt controllers, clock         vm.rs
//!   vcpus   = registers, local APIC, ...           vcpu.rs
//!   devices = each device's own State, and its transport's
//! ```
//!
//! Memory is apart: it is a file of its own, which clones map privately.

pub mod format;
pub mod machine;
pub mod vcpu;
pub mod vm;
