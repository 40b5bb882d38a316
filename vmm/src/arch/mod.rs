//! The code for the machine's architecture. No other module may use a register
//! or an address of it.

pub mod x86_64;
