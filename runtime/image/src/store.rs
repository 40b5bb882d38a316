//! What images are here: metadata in redb, one EROFS file per chain id.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::chain::ChainId;
use super::pull::Flights;
use super::reference::{self, Name};
use super::{Error, Image, ImageConfig, document};
use husk_base::dirs;
use husk_base::lock;
use husk_base::remove_tree;

/// Id to record, as JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");

/// What is kept of an image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: String,
    pub(super) tags: BTreeSet<String>,
    pub(super) digests: BTreeSet<String>,
    pub(super) chain_id: ChainId,
    pub(super) size: u64,
    /// The configuration's own bytes, which the id is the digest of.
    pub(super) config: String,
    /// Of the manifest that was pulled last.
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

/// The node's images.
#[derive(Debug)]
pub struct ImageStore {
    database: Database,
    directory: PathBuf,
    pub(super) config: ImageConfig,
    pub(super) flights: Flights,
    /// Held while a record and its file come or go together: several images
    /// may have one file.
    files: Mutex<()>,
}

/// What the images take.
#[derive(Clone, Debug)]
pub struct FsInfo {
    /// The folder they are in.
    pub directory: PathBuf,
    /// Bytes on disk.
    pub used_bytes: u64,
    /// Files.
    pub inodes: u64,
}

impl ImageStore {
    /// Opens the images under `root`, and sweeps what unfinished pulls left.
    ///
    /// # Errors
    /// The disk's, or a database that another process has open.
    pub fn open(root: &Path, config: ImageConfig) -> Result<Self, Error> {
        let directory = root.join("images");
        // Programs of images are in it, with the owners and modes that images say.
        dirs::make(&directory, dirs::ROOT_ONLY).map_err(file("make folder", &directory))?;
        for folder in ["rootfs", "pulls"].map(|name| directory.join(name)) {
            std::fs::create_dir_all(&folder).map_err(file("make folder", &folder))?;
        }
        let database = Database::create(directory.join("metadata.redb")).map_err(metadata)?;
        let write = database.begin_write().map_err(metadata)?;
        drop_unread(&mut write.open_table(IMAGES).map_err(metadata)?)?;
        write.commit().map_err(metadata)?;
        let store =
            Self { database, directory, config, flights: Flights::default(), files: Mutex::default() };
        // What cannot be removed takes room, and nothing else.
        let (pulls, rootfs) = (store.sweep_pulls(), store.sweep_rootfs());
        for error in [pulls, rootfs].into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "sweep what unfinished pulls left");
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

    /// Removes files that no image has.
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

    /// The image that `name` means: a reference, an id, or the beginning of one.
    /// One whose files have gone is not here; a pull brings it back.
    ///
    /// # Errors
    /// An ambiguous id, or the database's.
    pub fn resolve(&self, name: &str) -> Result<Option<Image>, Error> {
        let record = self.find(name)?.filter(|record| self.has_files(record));
        record.map(|record| self.image(record)).transpose()
    }

    fn find(&self, name: &str) -> Result<Option<Record>, Error> {
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
                    let has = |record: &&Record| {
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

    /// All images.
    ///
    /// # Errors
    /// The database's.
    pub fn list(&self) -> Result<Vec<Image>, Error> {
        let here = self.records()?.into_iter().filter(|record| self.has_files(record));
        here.map(|record| self.image(record)).collect()
    }

    /// Removes an image with all its names. One that is not here is removed
    /// already; machines that have its file open keep it until they end.
    ///
    /// # Errors
    /// The disk's or the database's.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let _files = lock(&self.files);
        let Some(record) = self.find(name)? else { return Ok(()) };
        let write = self.database.begin_write().map_err(metadata)?;
        let shared = {
            let mut table = write.open_table(IMAGES).map_err(metadata)?;
            table.remove(record.id.as_str()).map_err(metadata)?;
            all(&table)?.iter().any(|other| other.chain_id == record.chain_id)
        };
        write.commit().map_err(metadata)?;
        if shared {
            return Ok(());
        }
        let rootfs = self.rootfs(&record.chain_id);
        match std::fs::remove_file(&rootfs) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(file("remove", &rootfs)(error)),
            _ => Ok(()),
        }
    }

    /// Publishes an image whose files are here already, its own or another's
    /// that is made of the same layers; false if they are not.
    pub(super) fn adopt(&self, record: Record) -> Result<bool, Error> {
        let _files = lock(&self.files);
        let Ok(metadata) = std::fs::metadata(self.rootfs(&record.chain_id)) else { return Ok(false) };
        self.publish(Record { size: metadata.len(), ..record })?;
        Ok(true)
    }

    /// Publishes an image with the file that a pull has made of it.
    pub(super) fn settle(&self, record: Record, packed: &Path) -> Result<(), Error> {
        let _files = lock(&self.files);
        let size = std::fs::metadata(packed).map_err(file("look at", packed))?.len();
        let rootfs = self.rootfs(&record.chain_id);
        std::fs::rename(packed, &rootfs).map_err(file("rename to", &rootfs))?;
        self.publish(Record { size, ..record })
    }

    /// A tag that led elsewhere leads to this image now.
    fn publish(&self, new: Record) -> Result<(), Error> {
        let write = self.database.begin_write().map_err(metadata)?;
        {
            let mut table = write.open_table(IMAGES).map_err(metadata)?;
            let mut new = new;
            for mut other in all(&table)? {
                if other.id == new.id {
                    new.tags.append(&mut other.tags);
                    new.digests.append(&mut other.digests);
                } else if other.tags.iter().any(|tag| new.tags.contains(tag)) {
                    other.tags.retain(|tag| !new.tags.contains(tag));
                    put(&mut table, &other)?;
                }
            }
            put(&mut table, &new)?;
        }
        write.commit().map_err(metadata)
    }

    /// What is kept of the image with this id, whether its files are here or not.
    pub(super) fn by_id(&self, id: &str) -> Result<Option<Record>, Error> {
        Ok(self.records()?.into_iter().find(|record| record.id == id))
    }

    fn has_files(&self, record: &Record) -> bool {
        self.rootfs(&record.chain_id).exists()
    }

    /// What the images take on disk.
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

    /// Where the EROFS file of a chain id is.
    pub(super) fn rootfs(&self, chain_id: &ChainId) -> PathBuf {
        self.directory.join("rootfs").join(format!("{}.erofs", chain_id.digits()))
    }

    /// Where pulls work.
    pub(super) fn pulls(&self) -> PathBuf {
        self.directory.join("pulls")
    }

    fn records(&self) -> Result<Vec<Record>, Error> {
        let read = self.database.begin_read().map_err(metadata)?;
        all(&read.open_table(IMAGES).map_err(metadata)?)
    }

    fn image(&self, record: Record) -> Result<Image, Error> {
        let config = document::configuration(&record.config).map_err(metadata)?;
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

/// Drops records that tell nothing, or name a file as no pull would: a pull
/// brings such an image back. What they name is left alone.
fn drop_unread(table: &mut redb::Table<'_, &'static str, &'static [u8]>) -> Result<(), Error> {
    let mut dropped = Vec::new();
    for row in table.iter().map_err(metadata)? {
        let (id, value) = row.map_err(metadata)?;
        if let Err(error) = serde_json::from_slice::<Record>(value.value()) {
            tracing::warn!(id = id.value(), %error, "image record does not read; removed");
            dropped.push(id.value().to_owned());
        }
    }
    for id in dropped {
        table.remove(id.as_str()).map_err(metadata)?;
    }
    Ok(())
}

fn all(table: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<Vec<Record>, Error> {
    let mut records = Vec::new();
    for row in table.iter().map_err(metadata)? {
        let (_, value) = row.map_err(metadata)?;
        records.push(serde_json::from_slice(value.value()).map_err(metadata)?);
    }
    Ok(records)
}

fn put(table: &mut redb::Table<'_, &'static str, &'static [u8]>, record: &Record) -> Result<(), Error> {
    let value = serde_json::to_vec(record).map_err(metadata)?;
    table.insert(record.id.as_str(), value.as_slice()).map_err(metadata)?;
    Ok(())
}

fn metadata(error: impl std::fmt::Display) -> Error {
    Error::Metadata(error.to_string())
}

/// For `map_err` on what is done to a file.
pub(super) fn file(stage: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |cause| Error::File { stage, path, cause }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// The name of a stack of one layer, whose digest has that digit alone.
    fn chain(digit: char) -> ChainId {
        format!("sha256:{}", String::from(digit).repeat(64)).try_into().unwrap()
    }

    fn record(id: char, tags: &[&str], layer: char) -> Record {
        Record {
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
    fn settle(store: &ImageStore, record: Record) {
        let packed = store.pulls().join("packed");
        std::fs::write(&packed, "files").unwrap();
        store.settle(record, &packed).unwrap();
    }

    #[test]
    fn an_image_is_found_by_all_its_names_also_after_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        settle(&store, record('a', &["docker.io/library/x:1"], '1'));
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
        settle(&store, record('a', &["docker.io/library/x:1"], '1'));
        settle(&store, record('b', &["docker.io/library/x:1"], '2'));
        assert!(store.resolve("x:1").unwrap().unwrap().id.contains("bbb"));
        assert!(store.resolve("aaaa").unwrap().unwrap().repo_tags.is_empty());
    }

    #[test]
    fn files_go_with_the_last_image_that_has_them() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        settle(&store, record('a', &["docker.io/library/x:1"], '1'));
        assert!(store.adopt(record('b', &["docker.io/library/x:2"], '1')).unwrap());
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
        assert!(!store.adopt(image()).unwrap());
        assert!(store.records().unwrap().is_empty());
        settle(&store, image());
        std::fs::remove_file(store.rootfs(&chain('1'))).unwrap();
        assert!(store.resolve("x:1").unwrap().is_none() && store.list().unwrap().is_empty());
        settle(&store, image());
        assert_eq!(store.resolve("x:1").unwrap().unwrap().size, 5);
    }

    #[test]
    fn an_image_is_not_published_while_its_files_go_with_another() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        for _ in 0..50 {
            settle(&store, record('a', &["docker.io/library/x:1"], '1'));
            let start = std::sync::Barrier::new(2);
            let adopted = std::thread::scope(|scope| {
                let adopts = scope.spawn(|| {
                    start.wait();
                    store.adopt(record('b', &["docker.io/library/x:2"], '1')).unwrap()
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
        std::fs::write(store.pulls().join("stray"), "").unwrap();
        std::fs::write(store.rootfs(&chain('3')), "unpublished").unwrap();
        // Deeper than a path can name and a stack is.
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
        settle(&store, record('a', &["docker.io/library/x:1"], '1'));
        // A folder where only files are removed.
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
        settle(&store, record('a', &["docker.io/library/x:1"], '1'));
        settle(&store, record('b', &["docker.io/library/x:2"], '2'));
        let elsewhere = root.path().join("disk.erofs");
        std::fs::write(&elsewhere, "of the host").unwrap();
        let write = store.database.begin_write().unwrap();
        {
            let mut table = write.open_table(IMAGES).unwrap();
            for (id, chain) in [('c', root.path().join("disk").to_str().unwrap()), ('d', "../../disk")] {
                let record = record(id, &[], '3');
                let mut value = serde_json::to_value(&record).unwrap();
                value["chain_id"] = chain.into();
                table.insert(record.id.as_str(), serde_json::to_vec(&value).unwrap().as_slice()).unwrap();
            }
        }
        write.commit().unwrap();
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
        settle(&store, one);
        settle(&store, record('a', &[], '2'));
        assert!(matches!(store.resolve("aaaa"), Err(Error::Ambiguous(_))));
    }
}
