//! The pod's containers, their states, and what each state allows.

pub mod bundle;
pub mod copy;
pub mod devices;
pub mod idmap;
pub mod images;
pub mod layer;
pub mod resources;
pub mod spec;
pub mod user;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::container::bundle::Bundle;
use crate::container::layer::Measured;
use crate::error::Error;
use crate::guest::cgroup::Cgroup;
use crate::process::Process;

/// Most containers of a pod, which bounds the memory that requests can make the
/// agent use.
const MAX_CONTAINERS: usize = 1024;

/// Most exec processes of a container that run or are remembered. When there
/// are more, the one that ended first is forgotten.
const MAX_EXECS: usize = 256;

/// A container that runc has created.
pub struct Container {
    /// The id, chosen by the host.
    pub id: String,
    /// The bundle and the layers.
    pub bundle: Bundle,
    pub cgroup: Arc<Cgroup>,
    /// The container's first process.
    pub init: Process,
    phase: Mutex<Phase>,
    execs: Mutex<HashMap<String, ExecSlot>>,
    /// The size of the container's writable layer.
    pub measured: Arc<Measured>,
}

/// The phase of a container's life. Whether it has exited is known from its
/// init process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Created,
    Starting,
    Started,
}

enum ExecSlot {
    /// runc is starting the container, so its id is taken.
    Starting,
    Running(Arc<Process>),
}

impl Container {
    /// Makes a container that has not been started.
    pub fn new(id: String, bundle: Bundle, cgroup: Arc<Cgroup>, init: Process) -> Self {
        Self {
            id,
            bundle,
            cgroup,
            init,
            phase: Mutex::new(Phase::Created),
            execs: Mutex::default(),
            measured: Arc::default(),
        }
    }

    /// Claims the right to start the container, which only one caller gets.
    pub fn begin_start(&self) -> Result<(), Error> {
        let mut phase = lock(&self.phase);
        if self.init.has_exited() {
            return Err(Error::Precondition(format!("container {} has exited", self.id)));
        }
        if *phase != Phase::Created {
            return Err(Error::Precondition(format!("container {} was started before", self.id)));
        }
        *phase = Phase::Starting;
        Ok(())
    }

    /// Records the result of the start. After a failure it may be tried again.
    pub fn end_start(&self, started: bool) {
        *lock(&self.phase) = if started { Phase::Started } else { Phase::Created };
    }

    /// Reserves an id for an exec, which must not be in use.
    pub fn reserve_exec(self: &Arc<Self>, process_id: &str) -> Result<ExecReservation, Error> {
        if *lock(&self.phase) != Phase::Started {
            return Err(Error::Precondition(format!("container {} was not started", self.id)));
        }
        if self.init.has_exited() {
            return Err(Error::Precondition(format!("container {} has exited", self.id)));
        }
        let mut execs = lock(&self.execs);
        if execs.contains_key(process_id) {
            return Err(Error::Exists(format!("container {} has a process {process_id:?}", self.id)));
        }
        if execs.len() >= MAX_EXECS && !forget_oldest(&mut execs) {
            return Err(Error::Exhausted(format!("container {} runs {MAX_EXECS} exec processes", self.id)));
        }
        execs.insert(process_id.to_owned(), ExecSlot::Starting);
        Ok(ExecReservation { container: self.clone(), process_id: Some(process_id.to_owned()) })
    }

    /// A process of the container; the empty id means its init.
    pub fn process(self: &Arc<Self>, process_id: &str) -> Result<ProcessRef, Error> {
        if process_id.is_empty() {
            return Ok(ProcessRef::Init(self.clone()));
        }
        match lock(&self.execs).get(process_id) {
            Some(ExecSlot::Running(process)) => Ok(ProcessRef::Exec(process.clone())),
            _ => Err(Error::NotFound(format!("container {} has no process {process_id:?}", self.id))),
        }
    }
}

/// Makes room by forgetting the exec that ended first.
fn forget_oldest(execs: &mut HashMap<String, ExecSlot>) -> bool {
    let ended = execs.iter().filter_map(|(id, slot)| match slot {
        ExecSlot::Running(process) => process.ended_at().map(|instant| (instant, id)),
        ExecSlot::Starting => None,
    });
    let oldest = ended.min().map(|(_, id)| id.clone());
    oldest.is_some_and(|id| execs.remove(&id).is_some())
}

/// A process of a container. Its container exists for as long as this is held.
pub enum ProcessRef {
    /// The container's first process.
    Init(Arc<Container>),
    /// An exec's process.
    Exec(Arc<Process>),
}

impl std::ops::Deref for ProcessRef {
    type Target = Process;

    fn deref(&self) -> &Process {
        match self {
            Self::Init(container) => &container.init,
            Self::Exec(process) => process,
        }
    }
}

/// An exec's id, released unless its process is started.
pub struct ExecReservation {
    container: Arc<Container>,
    process_id: Option<String>,
}

impl ExecReservation {
    /// Makes the process known under the reserved id.
    pub fn publish(mut self, process: Process) {
        if let Some(id) = self.process_id.take() {
            lock(&self.container.execs).insert(id, ExecSlot::Running(Arc::new(process)));
        }
    }
}

impl Drop for ExecReservation {
    fn drop(&mut self) {
        if let Some(id) = &self.process_id {
            lock(&self.container.execs).remove(id);
        }
    }
}

/// All containers by id.
#[derive(Default)]
pub struct Containers(Mutex<HashMap<String, Slot>>);

enum Slot {
    Creating,
    Ready(Arc<Container>),
    Removing,
}

impl Slot {
    fn ready(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self {
            Self::Ready(container) => Ok(container.clone()),
            Self::Creating => Err(Error::Precondition(format!("container {id} is being created"))),
            Self::Removing => Err(Error::Precondition(format!("container {id} is being removed"))),
        }
    }
}

impl Containers {
    /// Reserves an id for a container that is about to be made.
    pub fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation, Error> {
        let mut slots = lock(&self.0);
        if slots.contains_key(id) {
            return Err(Error::Exists(format!("there is a container {id}")));
        }
        if slots.len() >= MAX_CONTAINERS {
            return Err(Error::Exhausted(format!("the pod has {MAX_CONTAINERS} containers")));
        }
        slots.insert(id.to_owned(), Slot::Creating);
        Ok(Reservation { containers: self.clone(), id: Some(id.to_owned()) })
    }

    /// The container with this id, unless it is being made or removed.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        match lock(&self.0).get(id) {
            None => Err(Error::NotFound(format!("there is no container {id}"))),
            Some(slot) => slot.ready(id),
        }
    }

    /// All containers, except those that are being made or removed.
    pub fn all(&self) -> Vec<Arc<Container>> {
        let slots = lock(&self.0);
        let ready = slots.values().filter_map(|slot| match slot {
            Slot::Ready(container) => Some(container.clone()),
            _ => None,
        });
        ready.collect()
    }

    /// Begins the removal of a container; `None` if there is none.
    pub fn begin_removal(self: &Arc<Self>, id: &str) -> Result<Option<Removal>, Error> {
        let mut slots = lock(&self.0);
        let container = match slots.get(id) {
            None => return Ok(None),
            Some(slot) => slot.ready(id)?,
        };
        slots.insert(id.to_owned(), Slot::Removing);
        Ok(Some(Removal { containers: self.clone(), container, done: false }))
    }
}

/// A container's id, released unless the container is made.
pub struct Reservation {
    containers: Arc<Containers>,
    id: Option<String>,
}

impl Reservation {
    /// Makes the container known under the reserved id.
    pub fn publish(mut self, container: Container) {
        if let Some(id) = self.id.take() {
            lock(&self.containers.0).insert(id, Slot::Ready(Arc::new(container)));
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            lock(&self.containers.0).remove(id);
        }
    }
}

/// A container that is being removed. If the removal fails, the container is
/// back, to be removed again.
pub struct Removal {
    containers: Arc<Containers>,
    pub container: Arc<Container>,
    done: bool,
}

impl Removal {
    /// Ends the removal: nothing is left of the container.
    pub fn finish(mut self) {
        self.done = true;
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        let mut slots = lock(&self.containers.0);
        let id = &self.container.id;
        if self.done {
            slots.remove(id);
        } else {
            slots.insert(id.clone(), Slot::Ready(self.container.clone()));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No holder of the lock leaves its data half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_given_once_and_given_back_when_creation_fails() {
        let containers = Arc::new(Containers::default());
        let reservation = containers.reserve("c").unwrap();
        assert!(matches!(containers.reserve("c"), Err(Error::Exists(_))));
        assert!(matches!(containers.get("c"), Err(Error::Precondition(_))));
        assert!(matches!(containers.begin_removal("c"), Err(Error::Precondition(_))));
        drop(reservation);
        assert!(matches!(containers.get("c"), Err(Error::NotFound(_))));
        assert!(containers.begin_removal("c").unwrap().is_none());
        assert!(containers.reserve("c").is_ok());
    }

    #[test]
    fn there_is_a_bound_on_containers() {
        let containers = Arc::new(Containers::default());
        let held: Vec<_> = (0..MAX_CONTAINERS).map(|n| containers.reserve(&n.to_string()).unwrap()).collect();
        assert!(matches!(containers.reserve("one-more"), Err(Error::Exhausted(_))));
        drop(held);
        assert!(containers.reserve("one-more").is_ok());
    }
}
