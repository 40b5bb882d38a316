//! The records of images, in a redb database.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_base::lock;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::Error;
use super::chain::ChainId;

/// The records by image id, in JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");

type Table<'a> = redb::Table<'a, &'static str, &'static [u8]>;

/// The record of an image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub(super) id: String,
    pub(super) tags: BTreeSet<String>,
    pub(super) digests: BTreeSet<String>,
    pub(super) chain_id: ChainId,
    pub(super) size: u64,
    /// The bytes of the configuration, whose digest is the id.
    pub(super) config: String,
    /// The annotations of the manifest that was pulled last.
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

/// The database of records.
#[derive(Debug)]
pub(super) struct Metadata {
    path: PathBuf,
    /// The open database; `None` after an error. redb refuses all work once a write has
    /// failed, as on a full disk, so the next call opens the database again.
    database: Mutex<Option<Database>>,
}

impl Metadata {
    /// Opens the database, and drops records that cannot be read.
    ///
    /// # Errors
    /// The disk fails, or another process has the database open.
    pub(super) fn open(path: PathBuf) -> Result<Self, Error> {
        let metadata = Self { path, database: Mutex::default() };
        metadata.change(drop_unread)?;
        Ok(metadata)
    }

    /// All records.
    pub(super) fn records(&self) -> Result<Vec<ImageRecord>, Error> {
        self.with(|database| {
            let read = database.begin_read().map_err(failed)?;
            all(&read.open_table(IMAGES).map_err(failed)?)
        })
    }

    /// Writes a record, and takes its tags from other images. If there is a record of
    /// that id, its names are kept.
    pub(super) fn publish(&self, new: &ImageRecord) -> Result<(), Error> {
        self.change(|table| {
            let mut new = new.clone();
            for mut other in all(table)? {
                if other.id == new.id {
                    new.tags.append(&mut other.tags);
                    new.digests.append(&mut other.digests);
                } else if other.tags.iter().any(|tag| new.tags.contains(tag)) {
                    other.tags.retain(|tag| !new.tags.contains(tag));
                    put(table, &other)?;
                }
            }
            put(table, &new)
        })
    }

    /// Removes a record, and returns the others.
    pub(super) fn remove(&self, id: &str) -> Result<Vec<ImageRecord>, Error> {
        self.change(|table| {
            table.remove(id).map_err(failed)?;
            all(table)
        })
    }

    /// Changes the table in one transaction.
    pub(super) fn change<T>(
        &self,
        work: impl FnOnce(&mut Table<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.with(|database| {
            let write = database.begin_write().map_err(failed)?;
            let done = work(&mut write.open_table(IMAGES).map_err(failed)?)?;
            write.commit().map_err(failed)?;
            Ok(done)
        })
    }

    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, Error>) -> Result<T, Error> {
        let mut held = lock(&self.database);
        let database = match held.take() {
            Some(database) => database,
            None => open(&self.path)?,
        };
        let done = work(&database)?;
        *held = Some(database);
        Ok(done)
    }
}

fn open(path: &Path) -> Result<Database, Error> {
    Database::create(path).map_err(failed)
}

/// Drops records that cannot be read, or name a file as no pull would. The file is left
/// alone, and a pull brings the image back.
fn drop_unread(table: &mut Table<'_>) -> Result<(), Error> {
    let mut dropped = Vec::new();
    for row in table.iter().map_err(failed)? {
        let (id, value) = row.map_err(failed)?;
        if let Err(error) = serde_json::from_slice::<ImageRecord>(value.value()) {
            tracing::warn!(id = id.value(), %error, "dropped an image record that cannot be read");
            dropped.push(id.value().to_owned());
        }
    }
    for id in dropped {
        table.remove(id.as_str()).map_err(failed)?;
    }
    Ok(())
}

fn all(table: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<Vec<ImageRecord>, Error> {
    let mut records = Vec::new();
    for row in table.iter().map_err(failed)? {
        let (_, value) = row.map_err(failed)?;
        records
            .push(serde_json::from_slice(value.value()).map_err(io::Error::from).map_err(Error::Metadata)?);
    }
    Ok(records)
}

fn put(table: &mut Table<'_>, record: &ImageRecord) -> Result<(), Error> {
    let value = serde_json::to_vec(record).map_err(io::Error::from).map_err(Error::Metadata)?;
    table.insert(record.id.as_str(), value.as_slice()).map_err(failed)?;
    Ok(())
}

/// Makes an error of the database's, whose cause may be a full disk.
fn failed(error: impl Into<redb::Error>) -> Error {
    Error::Metadata(match error.into() {
        redb::Error::Io(error) => error,
        error => io::Error::other(error),
    })
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};

    use super::*;

    fn record(id: &str, config: &str) -> ImageRecord {
        ImageRecord {
            id: id.to_owned(),
            tags: BTreeSet::new(),
            digests: BTreeSet::new(),
            chain_id: format!("sha256:{}", "1".repeat(64)).try_into().unwrap(),
            size: 1,
            config: config.to_owned(),
            annotations: BTreeMap::new(),
        }
    }

    #[test]
    fn a_disk_that_was_full_for_a_while_is_written_again() {
        const NOTHING: Option<&str> = None;
        let folder = tempfile::tempdir().unwrap();
        let run = move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            mount(NOTHING, "/", NOTHING, MsFlags::MS_SLAVE | MsFlags::MS_REC, NOTHING).unwrap();
            mount(NOTHING, folder.path(), Some("tmpfs"), MsFlags::empty(), Some("size=32M")).unwrap();
            let metadata = Metadata::open(folder.path().join("metadata.redb")).unwrap();
            metadata.publish(&record("first", "{}")).unwrap();
            let filler = folder.path().join("filler");
            let room = rustix::fs::statvfs(folder.path()).unwrap();
            std::fs::write(&filler, vec![1; (room.f_bavail * room.f_frsize) as usize]).unwrap();
            let large = "x".repeat(1 << 20);
            let error = (0..64)
                .find_map(|number| metadata.publish(&record(&number.to_string(), &large)).err())
                .expect("the disk is full");
            assert!(error.is_disk_full(), "{error:?}");
            std::fs::remove_file(filler).unwrap();
            metadata.publish(&record("last", "{}")).unwrap();
            let ids: Vec<_> = metadata.records().unwrap().into_iter().map(|record| record.id).collect();
            assert!(ids.contains(&"first".to_owned()) && ids.contains(&"last".to_owned()), "{ids:?}");
        };
        std::thread::spawn(run).join().unwrap();
    }
}
