//! What depends on the machine's architecture. Nothing outside of this module
//! may know a register or an address of it.

pub mod x86_64;
