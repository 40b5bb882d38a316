//! Husk's virtual machine monitor: one process, one pod's machine.
//!
//! [`vmm`] is the process, which lives in a [`jail`]: it waits for requests
//! ([`control`]) and for the machine's end ([`exit`]). [`builder`] makes a [`machine`] of a request to
//! boot: guest [`memory`] with a [`kernel`] in it, [`devices`], and a thread
//! per [`vcpu`]. [`arch`] knows the processor; [`snapshot`] knows how a machine
//! is saved.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod arch;
pub mod builder;
pub mod console;
pub mod control;
pub mod devices;
pub mod exit;
pub mod hypervisor;
pub mod jail;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod snapshot;
pub mod stage;
pub mod vcpu;
pub mod vmm;

/// Locks a mutex. A panic ends the process at once, so no lock stays poisoned
/// for anybody to see; a test's does not matter.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
