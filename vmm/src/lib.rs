//! Husk's virtual machine monitor: one process for the machine of one pod.
//!
//! - [`vmm`] is the process's main loop. It serves requests ([`control`]) until the machine ends
//!   ([`exit`]), inside a [`jail`].
//! - [`builder`] makes a [`machine`] of a request to boot: guest [`memory`] with a [`kernel`] in it,
//!   [`devices`], and a thread for each [`vcpu`].
//! - [`arch`] holds what depends on the processor; [`snapshot`] saves and restores machines.

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

/// Locks a mutex. A panic ends the process at once, so nobody sees a poisoned
/// lock outside of tests, where it does not matter.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
