//! Operation locks: the tokens that an operation holds while it changes a pod or a
//! container, across all of its steps.
//!
//! A function that counts on a lock takes the token of it. Locks are taken in the order
//! container, pod, image disks, and the types hold the first two to it: the container's
//! lock is taken with [`Unlocked`] in hand, which whoever holds a pod's has given away.
//! CONTRIBUTING.md, "Locks", says which operations take them.

use std::ops::Deref;
use std::sync::Arc;

use tokio::sync::MutexGuard;

use super::container::Container;
use super::sandbox::Sandbox;

/// The beginning of an operation, which holds no lock yet. It makes one of these, and no
/// function that it calls does.
#[derive(Debug)]
pub(crate) struct Unlocked(());

impl Unlocked {
    /// Begins an operation.
    pub(crate) const fn new() -> Self {
        Self(())
    }
}

/// The locks after which a pod's may be taken: none, or a container's.
pub(crate) trait BeforeSandbox {}

impl BeforeSandbox for Unlocked {}
impl BeforeSandbox for ContainerOp<'_> {}

/// The lock of a pod, and of its set of containers.
#[derive(Debug)]
pub(crate) struct SandboxOp<'a> {
    sandbox: &'a Arc<Sandbox>,
    _lock: MutexGuard<'a, ()>,
}

impl<'a> SandboxOp<'a> {
    pub(super) fn new(sandbox: &'a Arc<Sandbox>, lock: MutexGuard<'a, ()>) -> Self {
        Self { sandbox, _lock: lock }
    }
}

impl Deref for SandboxOp<'_> {
    type Target = Arc<Sandbox>;

    fn deref(&self) -> &Arc<Sandbox> {
        self.sandbox
    }
}

/// The lock of a container.
#[derive(Debug)]
pub(crate) struct ContainerOp<'a> {
    container: &'a Arc<Container>,
    lock: MutexGuard<'a, ContainerTurn>,
}

/// The state of a container that only the operation which holds its lock sees.
#[derive(Debug, Default)]
pub(crate) struct ContainerTurn {
    /// The stop signal was sent.
    asked_to_stop: bool,
}

impl<'a> ContainerOp<'a> {
    pub(super) fn new(container: &'a Arc<Container>, lock: MutexGuard<'a, ContainerTurn>) -> Self {
        Self { container, lock }
    }

    /// Whether the stop signal was sent.
    pub(crate) fn was_asked_to_stop(&self) -> bool {
        self.lock.asked_to_stop
    }

    /// Notes that the stop signal was sent.
    pub(crate) fn set_asked_to_stop(&mut self) {
        self.lock.asked_to_stop = true;
    }
}

impl Deref for ContainerOp<'_> {
    type Target = Arc<Container>;

    fn deref(&self) -> &Arc<Container> {
        self.container
    }
}
