//! The images of the node: their metadata in redb, and one EROFS file per chain id.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use husk_base::{FileError, blocking, chain, dirs, lock, remove_tree};

use super::chain::ChainId;
use super::gate::{Gates, InFlight};
use super::metadata::{ImageRecord, Metadata};
use super::reference::{self, Name};
use super::{Error, Image, ImageConfig, document};

/// The node's images.
#[derive(Debug)]
pub struct ImageStore {
    metadata: Metadata,
    directory: PathBuf,
    pub(super) config: ImageConfig,
    pub(super) in_flight: InFlight,
    pub(super) gates: Gates,
    /// The lock under which a record and its file are added or removed together: several
    /// images may share one file.
    files: Mutex<()>,
}

/// The disk space that the images use.
#[derive(Clone, Debug)]
pub struct FsInfo {
    /// The folder of the images.
    pub directory: PathBuf,
    /// The number of bytes on disk.
    pub used_bytes: u64,
    /// The number of files.
    pub inodes: u64,
}

impl ImageStore {
    /// Opens the images below `root`, and removes the leftovers of unfinished
    /// pulls.
    ///
    /// # Errors
    /// The disk fails, or another process has the database open.
    pub fn open(root: &Path, config: ImageConfig) -> Result<Self, Error> {
        let directory = root.join("images");
        // Pulls unpack programs below it, with the owners and modes that images choose.
        dirs::make(&directory, dirs::ROOT_ONLY).map_err(file("make folder", &directory))?;
        for folder in ["rootfs", "pulls"].map(|name| directory.join(name)) {
            std::fs::create_dir_all(&folder).map_err(file("make folder", &folder))?;
        }
        let metadata = Metadata::open(directory.join("metadata.redb"))?;
        let gates = Gates::new(&config, &directory);
        let in_flight = InFlight::default();
        let store = Self { metadata, directory, config, in_flight, gates, files: Mutex::default() };
        // A leftover that cannot be removed takes space, but does no other
        // harm.
        let (pulls, rootfs) = (store.sweep_pulls(), store.sweep_rootfs());
        for error in [pulls, rootfs].into_iter().filter_map(Result::err) {
            tracing::warn!(error = chain(&error), "sweep what unfinished pulls left");
        }
        Ok(store)
    }

    /// Removes the folders of unfinished pulls.
    fn sweep_pulls(&self) -> Result<(), Error> {
        let pulls = self.pulls();
        let mut result = Ok(());
        for entry in std::fs::read_dir(&pulls).map_err(file("read folder", &pulls))?.flatten() {
            let path = entry.path();
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let removed = if is_folder { remove_tree(&path) } else { std::fs::remove_file(&path) };
            result = result.and(removed.map_err(file("remove", &path)));
        }
        result
    }

    /// Removes files that belong to no image.
    fn sweep_rootfs(&self) -> Result<(), Error> {
        let used: BTreeSet<_> = self.records()?.iter().map(|record| self.rootfs(&record.chain_id)).collect();
        let folder = self.directory.join("rootfs");
        let mut result = Ok(());
        for entry in std::fs::read_dir(&folder).map_err(file("read folder", &folder))?.flatten() {
            let path = entry.path();
            if !used.contains(&path) {
                result = result.and(std::fs::remove_file(&path).map_err(file("remove", &path)));
            }
        }
        result
    }

    /// Finds the image that `name` means: a reference, an id, or the beginning of one. An
    /// image whose files are missing is not found; a pull brings it back.
    ///
    /// # Errors
    /// An ambiguous id, or the database's.
    pub fn resolve(&self, name: &str) -> Result<Option<Image>, Error> {
        let record = self.find(name)?.filter(|record| self.has_files(record));
        record.map(|record| self.image(record)).transpose()
    }

    fn find(&self, name: &str) -> Result<Option<ImageRecord>, Error> {
        let records = self.records()?;
        for candidate in reference::candidates(name) {
            match candidate {
                Name::Id(digits) => {
                    let id = format!("sha256:{digits}");
                    let mut matches = records.iter().filter(|record| record.id.starts_with(&id));
                    match (matches.next(), matches.next()) {
                        (Some(record), None) => return Ok(Some(record.clone())),
                        (Some(_), Some(_)) => return Err(Error::Ambiguous(name.to_owned())),
                        (None, _) => {}
                    }
                }
                Name::Reference(reference) => {
                    let has = |record: &&ImageRecord| {
                        record.tags.contains(&reference) || record.digests.contains(&reference)
                    };
                    if let Some(record) = records.iter().find(has) {
                        return Ok(Some(record.clone()));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Lists all images.
    ///
    /// # Errors
    /// The database's.
    pub fn list(&self) -> Result<Vec<Image>, Error> {
        let here = self.records()?.into_iter().filter(|record| self.has_files(record));
        here.map(|record| self.image(record)).collect()
    }

    /// Removes an image with all its names. Removing an unknown image succeeds. Machines
    /// that have its file open keep it until they end.
    ///
    /// # Errors
    /// The disk's or the database's.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let _files = lock(&self.files);
        let Some(record) = self.find(name)? else { return Ok(()) };
        let others = self.metadata.remove(&record.id)?;
        if others.iter().any(|other| other.chain_id == record.chain_id) {
            return Ok(());
        }
        let rootfs = self.rootfs(&record.chain_id);
        match std::fs::remove_file(&rootfs) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(file("remove", &rootfs)(error)),
            _ => Ok(()),
        }
    }

    /// Publishes an image whose file is here already: its own, or that of another image
    /// with the same layers. Returns false if there is no file.
    pub(super) fn commit_existing(&self, record: ImageRecord) -> Result<bool, Error> {
        let _files = lock(&self.files);
        let Ok(metadata) = std::fs::metadata(self.rootfs(&record.chain_id)) else { return Ok(false) };
        self.metadata.publish(&ImageRecord { size: metadata.len(), ..record })?;
        Ok(true)
    }

    /// Publishes an image with the file that a pull has made.
    pub(super) fn commit(&self, record: ImageRecord, packed: &Path) -> Result<(), Error> {
        let _files = lock(&self.files);
        let size = std::fs::metadata(packed).map_err(file("look at", packed))?.len();
        let rootfs = self.rootfs(&record.chain_id);
        std::fs::rename(packed, &rootfs).map_err(file("rename to", &rootfs))?;
        self.metadata.publish(&ImageRecord { size, ..record })
    }

    /// The record of the image with this id, whether its file is here or not.
    pub(super) fn by_id(&self, id: &str) -> Result<Option<ImageRecord>, Error> {
        Ok(self.records()?.into_iter().find(|record| record.id == id))
    }

    /// Makes calls of the store on a thread where they may block.
    pub async fn beside<T: Send + 'static>(
        self: &Arc<Self>,
        calls: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> T {
        let store = self.clone();
        blocking(move || calls(&store)).await
    }

    /// The number of names that are being pulled.
    #[must_use]
    pub fn pulls_under_way(&self) -> usize {
        self.in_flight.count()
    }

    fn has_files(&self, record: &ImageRecord) -> bool {
        self.rootfs(&record.chain_id).exists()
    }

    /// The disk space that the images use.
    #[must_use]
    pub fn fs_info(&self) -> FsInfo {
        use std::os::unix::fs::MetadataExt;
        let files = std::fs::read_dir(self.directory.join("rootfs")).into_iter().flatten().flatten();
        let (mut used_bytes, mut inodes) = (0u64, 0u64);
        for metadata in files.filter_map(|entry| entry.metadata().ok()) {
            used_bytes = used_bytes.saturating_add(metadata.blocks().saturating_mul(512));
            inodes += 1;
        }
        FsInfo { directory: self.directory.clone(), used_bytes, inodes }
    }

    /// The path of a chain id's EROFS file.
    pub(super) fn rootfs(&self, chain_id: &ChainId) -> PathBuf {
        self.directory.join("rootfs").join(format!("{}.erofs", chain_id.digits()))
    }

    /// The folder in which pulls work.
    pub(super) fn pulls(&self) -> PathBuf {
        self.directory.join("pulls")
    }

    fn records(&self) -> Result<Vec<ImageRecord>, Error> {
        self.metadata.records()
    }

    fn image(&self, record: ImageRecord) -> Result<Image, Error> {
        let config =
            document::configuration(&record.config).map_err(|error| Error::Metadata(error.into()))?;
        Ok(Image {
            rootfs: self.rootfs(&record.chain_id),
            id: record.id.into(),
            repo_tags: record.tags.into_iter().collect(),
            repo_digests: record.digests.into_iter().collect(),
            size: record.size,
            annotations: record.annotations,
            config: Arc::new(config),
        })
    }
}

pub(super) fn file(stage: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| FileError { stage, path, source }.into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The chain id of one layer, whose digest repeats that digit.
    fn chain(digit: char) -> ChainId {
        format!("sha256:{}", String::from(digit).repeat(64)).try_into().unwrap()
    }

    fn record(id: char, tags: &[&str], layer: char) -> ImageRecord {
        ImageRecord {
            id: format!("sha256:{}", String::from(id).repeat(64)),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            digests: BTreeSet::from([format!("docker.io/library/x@sha256:{}", String::from(id).repeat(64))]),
            chain_id: chain(layer),
            size: 1,
            config: r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{}}"#
                .into(),
            annotations: BTreeMap::from([("of".to_owned(), String::from(id))]),
        }
    }

    fn open(root: &Path) -> ImageStore {
        ImageStore::open(root, ImageConfig::default()).unwrap()
    }

    /// Publishes an image with its file.
    fn commit(store: &ImageStore, record: ImageRecord) {
        let packed = store.pulls().join("packed");
        std::fs::write(&packed, "files").unwrap();
        store.commit(record, &packed).unwrap();
    }

    #[test]
    fn an_image_is_found_by_all_its_names_also_after_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        commit(&store, record('a', &["docker.io/library/x:1"], '1'));
        drop(store);
        let store = open(root.path());
        let digest = format!("x@sha256:{}", "a".repeat(64));
        for name in ["x:1", "docker.io/library/x:1", "aaaaaaa", &"a".repeat(64), &digest] {
            let image = store.resolve(name).unwrap().unwrap_or_else(|| panic!("{name}"));
            assert_eq!(image.repo_tags, ["docker.io/library/x:1"]);
            assert_eq!(image.annotations.get("of").map(String::as_str), Some("a"));
        }
        assert!(store.resolve("x:2").unwrap().is_none());
        assert!(store.resolve("not a name").unwrap().is_none());
    }

    #[test]
    fn a_tag_leads_to_the_image_that_was_pulled_last() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        commit(&store, record('a', &["docker.io/library/x:1"], '1'));
        commit(&store, record('b', &["docker.io/library/x:1"], '2'));
        assert!(store.resolve("x:1").unwrap().unwrap().id.contains("bbb"));
        assert!(store.resolve("aaaa").unwrap().unwrap().repo_tags.is_empty());
    }

    #[test]
    fn files_go_with_the_last_image_that_has_them() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        commit(&store, record('a', &["docker.io/library/x:1"], '1'));
        assert!(store.commit_existing(record('b', &["docker.io/library/x:2"], '1')).unwrap());
        let rootfs = store.rootfs(&chain('1'));
        store.remove("x:1").unwrap();
        assert!(rootfs.exists());
        store.remove("x:1").unwrap();
        store.remove("x:2").unwrap();
        assert!(!rootfs.exists());
    }

    #[test]
    fn an_image_without_its_files_is_not_here() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let image = || record('a', &["docker.io/library/x:1"], '1');
        assert!(!store.commit_existing(image()).unwrap());
        assert!(store.records().unwrap().is_empty());
        commit(&store, image());
        std::fs::remove_file(store.rootfs(&chain('1'))).unwrap();
        assert!(store.resolve("x:1").unwrap().is_none() && store.list().unwrap().is_empty());
        commit(&store, image());
        assert_eq!(store.resolve("x:1").unwrap().unwrap().size, 5);
    }

    #[test]
    fn an_image_is_not_published_while_its_files_go_with_another() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        for _ in 0..50 {
            commit(&store, record('a', &["docker.io/library/x:1"], '1'));
            let start = std::sync::Barrier::new(2);
            let adopted = std::thread::scope(|scope| {
                let adopts = scope.spawn(|| {
                    start.wait();
                    store.commit_existing(record('b', &["docker.io/library/x:2"], '1')).unwrap()
                });
                start.wait();
                store.remove("x:1").unwrap();
                adopts.join().unwrap()
            });
            assert_eq!(store.rootfs(&chain('1')).exists(), adopted);
            assert_eq!(store.resolve("x:2").unwrap().is_some(), adopted);
            store.remove("x:2").unwrap();
        }
    }

    #[test]
    fn what_a_crash_left_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        std::fs::create_dir_all(store.pulls().join("1/files")).unwrap();
        std::fs::write(store.pulls().join("leftover"), "").unwrap();
        std::fs::write(store.rootfs(&chain('3')), "unpublished").unwrap();
        // This is deeper than a path can name or a stack can follow.
        let mut inner = root.path().join("seed");
        std::fs::create_dir(&inner).unwrap();
        for level in 0..3000 {
            let outer = root.path().join(format!("level-{level}"));
            std::fs::create_dir(&outer).unwrap();
            std::fs::rename(&inner, outer.join("deep")).unwrap();
            inner = outer;
        }
        std::fs::rename(&inner, store.pulls().join("2")).unwrap();
        drop(store);
        let store = open(root.path());
        assert_eq!(std::fs::read_dir(store.pulls()).unwrap().count(), 0);
        assert!(!store.rootfs(&chain('3')).exists());
    }

    #[test]
    fn what_cannot_be_swept_does_not_keep_the_images_away() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        commit(&store, record('a', &["docker.io/library/x:1"], '1'));
        // This is a folder where there should be only files.
        std::fs::create_dir_all(store.rootfs(&chain('3')).join("full")).unwrap();
        std::fs::write(store.rootfs(&chain('4')), "unpublished").unwrap();
        drop(store);
        let store = open(root.path());
        assert!(store.resolve("x:1").unwrap().is_some());
        assert!(!store.rootfs(&chain('4')).exists(), "the others are swept");
    }

    #[test]
    fn a_record_that_names_a_file_elsewhere_is_dropped_and_the_file_stays() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        commit(&store, record('a', &["docker.io/library/x:1"], '1'));
        commit(&store, record('b', &["docker.io/library/x:2"], '2'));
        let elsewhere = root.path().join("disk.erofs");
        std::fs::write(&elsewhere, "of the host").unwrap();
        let write = |table: &mut redb::Table<'_, &'static str, &'static [u8]>| {
            for (id, chain) in [('c', root.path().join("disk").to_str().unwrap()), ('d', "../../disk")] {
                let record = record(id, &[], '3');
                let mut value = serde_json::to_value(&record).unwrap();
                value["chain_id"] = chain.into();
                table.insert(record.id.as_str(), serde_json::to_vec(&value).unwrap().as_slice()).unwrap();
            }
            Ok(())
        };
        store.metadata.change(write).unwrap();
        drop(store);
        let store = open(root.path());
        assert_eq!(store.list().unwrap().len(), 2);
        store.remove("cccc").unwrap();
        store.remove("dddd").unwrap();
        store.remove("x:1").unwrap();
        assert!(elsewhere.exists());
        assert!(store.resolve("x:2").unwrap().is_some());
    }

    #[test]
    fn an_id_that_fits_two_images_is_ambiguous() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let mut one = record('a', &[], '1');
        one.id.replace_range(60.., "00000000000");
        commit(&store, one);
        commit(&store, record('a', &[], '2'));
        assert!(matches!(store.resolve("aaaa"), Err(Error::Ambiguous(_))));
    }
}
