//! The image disks of a machine: block devices that exist from the start and
//! get a file behind them when a container needs its image. Containers of one
//! image share a disk. A host pod has as many as it wants.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tokio::sync::{Mutex, MutexGuard};

/// Which image each disk holds, and for how many containers.
#[derive(Debug)]
pub struct Slots {
    used: Mutex<BTreeMap<String, Use>>,
    /// None where each image gets a name of its own.
    names: Option<Vec<String>>,
}

#[derive(Debug)]
struct Use {
    rootfs: PathBuf,
    containers: usize,
}

/// What to do so that a container has its image.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    /// The disk holds it already.
    Shared(String),
    /// Put it into this disk.
    Attach(String),
}

impl Claim {
    /// Serial number of the disk.
    #[must_use]
    pub fn slot(&self) -> &str {
        match self {
            Self::Shared(slot) | Self::Attach(slot) => slot,
        }
    }
}

impl Slots {
    /// Serial numbers of the disks of a machine with `count` of them.
    #[must_use]
    pub fn names(count: u8) -> Vec<String> {
        (0..count).map(|number| format!("image-{number}")).collect()
    }

    /// All empty.
    #[must_use]
    pub fn new(count: u8) -> Self {
        Self { used: Mutex::default(), names: Some(Self::names(count)) }
    }

    /// Those of a host pod: one for each image, named after its file.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { used: Mutex::default(), names: None }
    }

    /// As the containers that exist have them.
    #[must_use]
    pub fn in_use(self, containers: impl IntoIterator<Item = (String, PathBuf)>) -> Self {
        let mut used = BTreeMap::<String, Use>::new();
        for (slot, rootfs) in containers {
            used.entry(slot).or_insert(Use { rootfs, containers: 0 }).containers += 1;
        }
        Self { used: Mutex::new(used), names: self.names }
    }

    /// Holds the disks still, so that one can be attached or detached before
    /// anybody else looks.
    pub async fn hold(&self) -> Held<'_> {
        Held { used: self.used.lock().await, names: self.names.as_deref() }
    }
}

/// The disks, held still.
#[derive(Debug)]
pub struct Held<'a> {
    used: MutexGuard<'a, BTreeMap<String, Use>>,
    names: Option<&'a [String]>,
}

impl Held<'_> {
    /// Takes the image for one more container; `None` when all disks hold
    /// other images.
    pub fn claim(&mut self, rootfs: &Path) -> Option<Claim> {
        if let Some((name, held)) = self.used.iter_mut().find(|(_, held)| held.rootfs == rootfs) {
            held.containers += 1;
            return Some(Claim::Shared(name.clone()));
        }
        let free = match self.names {
            Some(names) => names.iter().find(|name| !self.used.contains_key(*name))?.clone(),
            None => rootfs.file_stem()?.to_string_lossy().into_owned(),
        };
        self.used.insert(free.clone(), Use { rootfs: rootfs.into(), containers: 1 });
        Some(Claim::Attach(free))
    }

    /// Takes several images for one more container: all of them, or none.
    pub fn claim_all<'a>(&mut self, images: impl Iterator<Item = &'a Path>) -> Option<Vec<Claim>> {
        let mut claims = Vec::new();
        for image in images {
            match self.claim(image) {
                Some(claim) => claims.push(claim),
                None => {
                    self.give_back(&claims);
                    return None;
                }
            }
        }
        Some(claims)
    }

    /// Undoes claims of which nothing was attached.
    pub fn give_back(&mut self, claims: &[Claim]) {
        for claim in claims {
            self.release(claim.slot());
        }
    }

    /// One container less; true when the disk is to be detached.
    pub fn release(&mut self, name: &str) -> bool {
        let Some(held) = self.used.get_mut(name) else { return false };
        held.containers = held.containers.saturating_sub(1);
        let last = held.containers == 0;
        if last {
            self.used.remove(name);
        }
        last
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn containers_of_one_image_share_its_disk_until_the_last_goes() {
        let slots = Slots::new(2);
        let mut held = slots.hold().await;
        let (one, two, three) = (Path::new("1"), Path::new("2"), Path::new("3"));
        assert_eq!(held.claim(one), Some(Claim::Attach("image-0".into())));
        assert_eq!(held.claim(one), Some(Claim::Shared("image-0".into())));
        assert_eq!(held.claim(two), Some(Claim::Attach("image-1".into())));
        assert_eq!(held.claim(three), None);
        assert!(!held.release("image-0"));
        assert!(held.release("image-0"));
        assert_eq!(held.claim(three), Some(Claim::Attach("image-0".into())));
    }

    #[tokio::test]
    async fn a_container_has_all_of_its_images_or_none() {
        let slots = Slots::new(2);
        let mut held = slots.hold().await;
        let (one, two, three) = (Path::new("1"), Path::new("2"), Path::new("3"));
        assert_eq!(held.claim_all([one, two, one, three].into_iter()), None);
        let (first, second) = ("image-0".to_owned(), "image-1".to_owned());
        let claims = held.claim_all([three, two, three].into_iter()).unwrap();
        assert_eq!(
            claims,
            [Claim::Attach(first.clone()), Claim::Attach(second.clone()), Claim::Shared(first.clone())]
        );
        assert!(!held.release(&first), "it has it twice");
        assert!(held.release(&first) && held.release(&second));
        let again = held.claim_all([one, one].into_iter()).unwrap();
        held.give_back(&again);
        assert_eq!(held.claim(two), Some(Claim::Attach(first)));
    }

    #[tokio::test]
    async fn a_host_pod_has_one_for_every_image() {
        let slots = Slots::unlimited();
        let mut held = slots.hold().await;
        for number in 0..100 {
            let rootfs = PathBuf::from(format!("/images/rootfs/{number}.erofs"));
            assert_eq!(held.claim(&rootfs), Some(Claim::Attach(number.to_string())));
            assert_eq!(held.claim(&rootfs), Some(Claim::Shared(number.to_string())));
        }
    }

    #[tokio::test]
    async fn a_restarted_daemon_finds_them_as_they_were() {
        let slots = Slots::new(2).in_use([("image-1".into(), "1".into()), ("image-1".into(), "1".into())]);
        let mut held = slots.hold().await;
        assert_eq!(held.claim(Path::new("1")), Some(Claim::Shared("image-1".into())));
        assert_eq!(held.claim(Path::new("2")), Some(Claim::Attach("image-0".into())));
    }
}
