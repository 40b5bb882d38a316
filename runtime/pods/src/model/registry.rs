//! All sandboxes and containers of the node, by id and by name.
//!
//! A name is reserved before anything is made under it, so a request that a
//! client repeats cannot make a second pod.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use husk_base::id::{ContainerId, SandboxId};
use husk_base::lock;

use super::container::Container;
use super::sandbox::Sandbox;
use super::unread::Unread;
use crate::span;

/// The node's sandboxes and containers.
#[derive(Debug, Default)]
pub struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sandboxes: BTreeMap<SandboxId, Arc<Sandbox>>,
    containers: BTreeMap<ContainerId, (Arc<Sandbox>, Arc<Container>)>,
    names: HashMap<String, String>,
    unread: BTreeMap<String, Unread>,
    unfinished: BTreeMap<SandboxId, String>,
}

impl Inner {
    /// The error for an id that leads to nothing: the id may belong to something
    /// whose record does not read.
    fn or_unread(&self, error: LookupError, wanted: &str) -> LookupError {
        let LookupError::Unknown { what, id } = &error else { return error };
        let is_wanted = |unread: &&Unread| unread.what == wanted && unread.id.starts_with(id);
        match self.unread.values().find(is_wanted).filter(|_| !id.is_empty()) {
            Some(unread) => LookupError::Unread { what, id: id.clone(), advice: unread.advice() },
            None => error,
        }
    }
}

/// An id does not lead to one pod or container.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// Nothing has this id.
    #[error("{what} `{id}` not found")]
    Unknown {
        /// "sandbox" or "container".
        what: &'static str,
        /// The id as the client gave it.
        id: String,
    },
    /// The record of the pod or container with this id does not read.
    #[error("{what} `{id}`: {advice}")]
    Unread {
        /// "sandbox" or "container".
        what: &'static str,
        /// The id as the client gave it.
        id: String,
        /// The way out, in words.
        advice: String,
    },
    /// Several ids start with the one that was given.
    #[error("{what} id `{id}` is ambiguous: give more of its characters")]
    Ambiguous {
        /// "sandbox" or "container".
        what: &'static str,
        /// The id as the client gave it.
        id: String,
    },
}

/// The name is held by another pod or container.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("name `{name}` is reserved for `{holder}`{advice}")]
pub struct NameTaken {
    /// The name that was asked for.
    pub name: String,
    /// The id of the pod or container that holds the name.
    pub holder: String,
    /// The way out if the holder's record does not read; else empty.
    pub advice: String,
}

/// A name that is held for a pod or container being made. The name is released when this is
/// dropped, unless it is kept.
#[derive(Debug)]
pub struct Reservation<'a> {
    registry: &'a Registry,
    name: Option<String>,
}

impl Reservation<'_> {
    /// The thing exists: the name is its own until it is removed.
    pub fn keep(mut self) {
        self.name = None;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            lock(&self.registry.inner).names.remove(&name);
        }
    }
}

impl Registry {
    /// Holds `name` for `id`.
    ///
    /// # Errors
    /// The name is held already.
    pub fn reserve(&self, name: String, id: &str) -> Result<Reservation<'_>, NameTaken> {
        let mut inner = lock(&self.inner);
        if let Some(holder) = inner.names.get(&name) {
            let advice = inner.unread.get(holder).map(|unread| format!(": {}", unread.advice()));
            return Err(NameTaken { holder: holder.clone(), name, advice: advice.unwrap_or_default() });
        }
        inner.names.insert(name.clone(), id.to_owned());
        Ok(Reservation { registry: self, name: Some(name) })
    }

    /// Makes a sandbox known.
    pub fn add_sandbox(&self, sandbox: Arc<Sandbox>) {
        lock(&self.inner).sandboxes.insert(sandbox.id.clone(), sandbox);
    }

    /// Forgets a sandbox and its name.
    pub fn remove_sandbox(&self, id: &SandboxId) {
        let mut inner = lock(&self.inner);
        inner.sandboxes.remove(id);
        let of_pod = |unread: &Unread| unread.sandbox.as_ref() == Some(id);
        let gone: Vec<_> = inner.unread.extract_if(.., |_, unread| of_pod(unread)).collect();
        inner.names.retain(|_, holder| {
            holder != id.as_str() && !gone.iter().any(|(container, _)| container == holder)
        });
    }

    /// Makes something known whose record does not read. Its name is taken.
    pub fn add_unread(&self, unread: Unread) {
        let mut inner = lock(&self.inner);
        if let Some(name) = &unread.name {
            inner.names.entry(name.clone()).or_insert_with(|| unread.id.clone());
        }
        inner.unread.insert(unread.id.clone(), unread);
    }

    /// Lists all pods and containers whose records do not read.
    pub fn unread(&self) -> Vec<Unread> {
        lock(&self.inner).unread.values().cloned().collect()
    }

    /// The containers of a pod whose records do not read.
    pub fn unread_of(&self, sandbox: &SandboxId) -> Vec<Unread> {
        let of_pod = |unread: &&Unread| unread.sandbox.as_ref() == Some(sandbox);
        lock(&self.inner).unread.values().filter(of_pod).cloned().collect()
    }

    /// Notes why a pod that was never ready could not be undone yet; `None` once
    /// it is.
    pub fn set_unfinished(&self, id: &SandboxId, why: Option<String>) {
        let unfinished = &mut lock(&self.inner).unfinished;
        match why {
            Some(why) => unfinished.insert(id.clone(), why),
            None => unfinished.remove(id),
        };
    }

    /// The pods that were never ready and are not undone yet, and why.
    pub fn unfinished(&self) -> BTreeMap<SandboxId, String> {
        lock(&self.inner).unfinished.clone()
    }

    /// Makes a container known.
    pub fn add_container(&self, sandbox: Arc<Sandbox>, container: Arc<Container>) {
        sandbox.add_container(container.clone());
        lock(&self.inner).containers.insert(container.id.clone(), (sandbox, container));
    }

    /// Forgets a container and its name.
    pub fn remove_container(&self, container: &Container) {
        let mut inner = lock(&self.inner);
        if let Some((sandbox, _)) = inner.containers.remove(&container.id) {
            sandbox.drop_container(container);
        }
        inner.names.retain(|_, holder| holder != container.id.as_str());
    }

    /// The sandbox with this id, or the only one whose id starts so. The present RPC is
    /// about it.
    ///
    /// # Errors
    /// No id starts so, or more than one does.
    pub fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, LookupError> {
        let inner = lock(&self.inner);
        by_prefix(&inner.sandboxes, "sandbox", id, SandboxId::from(id), SandboxId::as_str)
            .cloned()
            .inspect(|sandbox| span::note_sandbox(&sandbox.id))
            .map_err(|error| inner.or_unread(error, "sandbox"))
    }

    /// The container with this id, or the only one whose id starts so. The present RPC is
    /// about it.
    ///
    /// # Errors
    /// No id starts so, or more than one does.
    pub fn container(&self, id: &str) -> Result<(Arc<Sandbox>, Arc<Container>), LookupError> {
        let inner = lock(&self.inner);
        by_prefix(&inner.containers, "container", id, ContainerId::from(id), ContainerId::as_str)
            .cloned()
            .inspect(|(sandbox, container)| {
                span::note_sandbox(&sandbox.id);
                span::note_container(&container.id);
            })
            .map_err(|error| inner.or_unread(error, "container"))
    }

    /// Lists all sandboxes.
    pub fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        lock(&self.inner).sandboxes.values().cloned().collect()
    }

    /// Lists all containers, each with its sandbox.
    pub fn containers(&self) -> Vec<(Arc<Sandbox>, Arc<Container>)> {
        lock(&self.inner).containers.values().cloned().collect()
    }
}

fn by_prefix<'a, K: Ord + Clone, V>(
    map: &'a BTreeMap<K, V>,
    what: &'static str,
    id: &str,
    key: K,
    text: impl Fn(&K) -> &str,
) -> Result<&'a V, LookupError> {
    let unknown = || LookupError::Unknown { what, id: id.to_owned() };
    if id.is_empty() {
        return Err(unknown());
    }
    let mut matches = map.range(key..).take_while(|(found, _)| text(found).starts_with(id));
    match (matches.next(), matches.next()) {
        (None, _) => Err(unknown()),
        (Some((found, value)), _) if text(found) == id => Ok(value),
        (Some((_, value)), None) => Ok(value),
        (Some(_), Some(_)) => Err(LookupError::Ambiguous { what, id: id.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_given_once_and_given_back() {
        let registry = Registry::default();
        let held = registry.reserve("web".into(), "1").unwrap();
        assert_eq!(registry.reserve("web".into(), "2").unwrap_err().holder, "1");
        drop(held);
        registry.reserve("web".into(), "3").unwrap().keep();
        assert!(registry.reserve("web".into(), "4").is_err());
    }

    #[test]
    fn a_prefix_finds_the_only_one_it_fits() {
        let map: BTreeMap<String, u8> =
            [("ab1", 1), ("ab2", 2), ("ab", 3), ("c", 4)].map(|(k, v)| (k.into(), v)).into();
        let find = |id: &str| by_prefix(&map, "sandbox", id, id.to_owned(), String::as_str).copied();
        assert_eq!(find("ab1"), Ok(1));
        assert_eq!(find("ab"), Ok(3), "an exact id wins over longer ones");
        assert_eq!(find("c"), Ok(4));
        assert!(matches!(find("a"), Err(LookupError::Ambiguous { .. })));
        assert!(matches!(find("x"), Err(LookupError::Unknown { .. })));
        assert!(matches!(find(""), Err(LookupError::Unknown { .. })));
    }
}
