//! Operations on pods and containers: each reads as a plan, its execution, and what
//! undoes it.
//!
//! An operation that changes something holds the lock of what it changes; it has to
//! run to its end whoever waits for it, for half a pod helps nobody.

mod attach;
mod capture;
mod check_sandbox;
mod clock;
mod command;
mod container_plan;
mod create_container;
mod exec;
mod exec_sync;
mod lifecycle;
mod log;
mod oom_score;
mod orphans;
mod pauses;
mod pin_cpus;
mod port_forward;
mod ready;
mod recover;
mod remove_container;
mod run_sandbox;
mod sandbox_cgroup;
mod signals;
mod start_container;
mod stop_container;
mod supervise;
mod synced_volumes;
#[cfg(test)]
mod tests;
mod update_resources;
mod usage;
mod vm_memory;

pub use attach::attach;
pub use create_container::create_container;
pub use exec::exec;
pub use exec_sync::{Output, exec_sync};
pub use lifecycle::{remove_sandbox, stop_sandbox};
pub use log::reopen_log;
pub use port_forward::port_forward;
pub use recover::recover;
pub use remove_container::remove_container;
pub use run_sandbox::run_sandbox;
pub use signals::cri_signal;
pub use start_container::start_container;
pub use stop_container::stop_container;
pub use update_resources::{update_container, update_sandbox};
pub use usage::{ContainerUsage, Usage, usage};
pub use vm_memory::memory_warning;
