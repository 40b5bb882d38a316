//! The image disks of a machine: block devices that exist from the start and
//! get a file behind them when a container needs its image. Containers of one
//! image share a disk. A host pod has as many as it wants.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use husk_base::id::ContainerId;
use tokio::sync::{Mutex, MutexGuard};

/// The image that each disk holds, and the containers that use it.
#[derive(Debug)]
pub struct ImageDisks {
    used: Mutex<BTreeMap<String, Use>>,
    /// `None` where each image gets a name of its own.
    names: Option<Vec<String>>,
}

#[derive(Debug)]
struct Use {
    rootfs: PathBuf,
    /// The containers that use the image; none for a disk that could not be emptied,
    /// on which nobody counts.
    holders: BTreeSet<ContainerId>,
}

/// The step that is left so that a container has its image.
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

impl ImageDisks {
    /// The disks of a VM that has just started: all empty.
    #[must_use]
    pub fn new(count: u8) -> Self {
        Self { used: Mutex::default(), names: Some(husk_vm::slot_names(count)) }
    }

    /// The disks of a host pod: one for each image, named after its file.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { used: Mutex::default(), names: None }
    }

    /// The disks as the containers that exist use them.
    #[must_use]
    pub fn in_use(self, disks: impl IntoIterator<Item = (ContainerId, String, PathBuf)>) -> Self {
        let mut used = BTreeMap::<String, Use>::new();
        for (holder, slot, rootfs) in disks {
            used.entry(slot).or_insert(Use { rootfs, holders: BTreeSet::new() }).holders.insert(holder);
        }
        Self { used: Mutex::new(used), names: self.names }
    }

    /// Holds the disks still, so that one can be attached or detached before
    /// anybody else looks.
    pub async fn hold(&self) -> HeldDisks<'_> {
        HeldDisks { used: self.used.lock().await, names: self.names.as_deref() }
    }
}

/// The disks, held still.
#[derive(Debug)]
pub struct HeldDisks<'a> {
    used: MutexGuard<'a, BTreeMap<String, Use>>,
    names: Option<&'a [String]>,
}

impl HeldDisks<'_> {
    /// Takes the image for a container; `None` when all disks hold other images.
    pub fn claim(&mut self, rootfs: &Path, holder: &ContainerId) -> Option<Claim> {
        let same = |held: &Use| held.rootfs == rootfs && !held.holders.is_empty();
        if let Some((name, held)) = self.used.iter_mut().find(|(_, held)| same(held)) {
            held.holders.insert(holder.clone());
            return Some(Claim::Shared(name.clone()));
        }
        let free = match self.names {
            Some(names) => names.iter().find(|name| !self.used.contains_key(*name))?.clone(),
            None => rootfs.file_stem()?.to_string_lossy().into_owned(),
        };
        let holders = BTreeSet::from([holder.clone()]);
        self.used.insert(free.clone(), Use { rootfs: rootfs.into(), holders });
        Some(Claim::Attach(free))
    }

    /// Takes several images for a container that has none yet: all of them, or
    /// none.
    pub fn claim_all<'a>(
        &mut self,
        images: impl Iterator<Item = &'a Path>,
        holder: &ContainerId,
    ) -> Option<Vec<Claim>> {
        let mut claims = Vec::new();
        for image in images {
            match self.claim(image, holder) {
                Some(claim) => claims.push(claim),
                None => {
                    self.unclaim(&claims, holder);
                    return None;
                }
            }
        }
        Some(claims)
    }

    /// How many hold an image.
    #[must_use]
    pub fn count(&self) -> usize {
        self.used.len()
    }

    /// Undoes claims of which nothing was attached.
    pub fn unclaim(&mut self, claims: &[Claim], holder: &ContainerId) {
        for claim in claims {
            if self.release(claim.slot(), holder) {
                self.emptied(claim.slot());
            }
        }
    }

    /// The container does not need the disk any more; true when it is to be
    /// detached, and [`Self::emptied`] to be told. Can be repeated: a container
    /// counts once, and a disk that was not emptied is to be detached again.
    pub fn release(&mut self, name: &str, holder: &ContainerId) -> bool {
        self.used.get_mut(name).is_some_and(|held| {
            held.holders.remove(holder);
            held.holders.is_empty()
        })
    }

    /// The disk holds nothing now, and is free.
    pub fn emptied(&mut self, name: &str) {
        self.used.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> [ContainerId; 3] {
        ["a", "b", "c"].map(ContainerId::from)
    }

    #[tokio::test]
    async fn containers_of_one_image_share_its_disk_until_the_last_goes() {
        let disks = ImageDisks::new(2);
        let mut held = disks.hold().await;
        let (one, two, three) = (Path::new("1"), Path::new("2"), Path::new("3"));
        let [a, b, c] = ids();
        assert_eq!(held.claim(one, &a), Some(Claim::Attach("image-0".into())));
        assert_eq!(held.claim(one, &b), Some(Claim::Shared("image-0".into())));
        assert_eq!(held.claim(two, &b), Some(Claim::Attach("image-1".into())));
        assert_eq!(held.claim(three, &c), None);
        assert!(!held.release("image-0", &a));
        assert!(held.release("image-0", &b));
        held.emptied("image-0");
        assert_eq!(held.claim(three, &c), Some(Claim::Attach("image-0".into())));
    }

    #[tokio::test]
    async fn a_container_that_is_removed_again_takes_no_disk_from_another() {
        let disks = ImageDisks::new(2);
        let mut held = disks.hold().await;
        let [a, b, c] = ids();
        let one = Path::new("1");
        held.claim(one, &a).unwrap();
        held.claim(one, &b).unwrap();
        assert!(!held.release("image-0", &a));
        assert!(!held.release("image-0", &a), "the other still has it");
        // The disk could not be detached, and nobody may take what may be in it.
        assert!(held.release("image-0", &b));
        assert_eq!(held.claim(one, &c), Some(Claim::Attach("image-1".into())));
        assert_eq!(held.claim(Path::new("2"), &c), None);
        assert!(held.release("image-0", &b), "it is detached by another try");
        held.emptied("image-0");
        assert!(!held.release("image-0", &b));
        assert_eq!(held.claim(Path::new("2"), &c), Some(Claim::Attach("image-0".into())));
    }

    #[tokio::test]
    async fn a_container_has_all_of_its_images_or_none() {
        let disks = ImageDisks::new(2);
        let mut held = disks.hold().await;
        let (one, two, three) = (Path::new("1"), Path::new("2"), Path::new("3"));
        let [a, b, _] = ids();
        assert_eq!(held.claim_all([one, two, one, three].into_iter(), &a), None);
        let (first, second) = ("image-0".to_owned(), "image-1".to_owned());
        let claims = held.claim_all([three, two, three].into_iter(), &a).unwrap();
        assert_eq!(
            claims,
            [Claim::Attach(first.clone()), Claim::Attach(second.clone()), Claim::Shared(first.clone())]
        );
        let shared = held.claim_all([two].into_iter(), &b).unwrap();
        assert_eq!(shared, [Claim::Shared(second.clone())]);
        held.unclaim(&shared, &b);
        assert!(held.release(&second, &a), "what was given back is nobody's");
        held.emptied(&second);
        assert!(held.release(&first, &a), "it has it twice, and lets go of it once");
        held.emptied(&first);
        let again = held.claim_all([one, one].into_iter(), &a).unwrap();
        held.unclaim(&again, &a);
        assert_eq!(held.claim(two, &a), Some(Claim::Attach(first)));
    }

    #[tokio::test]
    async fn a_host_pod_has_one_for_every_image() {
        let disks = ImageDisks::unlimited();
        let mut held = disks.hold().await;
        let [a, b, _] = ids();
        for number in 0..100 {
            let rootfs = PathBuf::from(format!("/images/rootfs/{number}.erofs"));
            assert_eq!(held.claim(&rootfs, &a), Some(Claim::Attach(number.to_string())));
            assert_eq!(held.claim(&rootfs, &b), Some(Claim::Shared(number.to_string())));
        }
    }

    #[tokio::test]
    async fn a_restarted_daemon_finds_them_as_they_were() {
        let [a, b, c] = ids();
        let disk = |holder: &ContainerId| (holder.clone(), "image-1".to_owned(), PathBuf::from("1"));
        let disks = ImageDisks::new(2).in_use([disk(&a), disk(&b)]);
        let mut held = disks.hold().await;
        assert_eq!(held.claim(Path::new("1"), &c), Some(Claim::Shared("image-1".into())));
        assert_eq!(held.claim(Path::new("2"), &c), Some(Claim::Attach("image-0".into())));
        assert!(!held.release("image-1", &a));
    }
}
