//! The model of pods and containers: records, what runs, who listens.
//!
//! Nothing here decides anything: operations are one floor up, in [`crate::ops`].

pub mod container;
mod container_record;
pub mod cpu_rate;
pub mod events;
pub mod fanout;
pub mod log;
pub mod names;
pub(crate) mod op;
pub mod registry;
pub mod sandbox;
mod sandbox_record;
mod stored;
pub mod unread;

pub use container::Container;
pub use container_record::{ContainerRecord, Exit, State};
pub use events::{Event, EventKind, EventStream, Events, Lagged};
pub(crate) use op::{ContainerOp, SandboxOp, Unlocked};
pub use registry::{LookupError, NameTaken, Registry};
pub use sandbox::{Sandbox, Version, Versions};
pub use sandbox_record::{BootTimes, Phase, SandboxRecord};
