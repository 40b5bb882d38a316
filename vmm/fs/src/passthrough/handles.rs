//! The files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use super::nodes::lock;
use crate::Errno;

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    /// The open file.
    pub file: OwnedFd,
    /// Whether it is open for writing.
    pub writable: bool,
    /// Whether it is in a trusted volume.
    pub trusted: bool,
    /// The offset at which the next read of a directory continues by itself;
    /// `None` if it has to be sought. Locked while the directory is read.
    pub position: Mutex<Option<u64>>,
}

/// All handles, by the numbers that the guest has.
#[derive(Debug)]
pub struct Handles {
    limit: usize,
    table: Mutex<(HashMap<u64, Arc<Handle>>, u64)>,
}

impl Handles {
    /// Makes an empty table for at most `limit` handles.
    pub fn new(limit: usize) -> Self {
        Self { limit, table: Mutex::default() }
    }

    /// Adds an open file; returns its number.
    pub fn add(&self, file: OwnedFd, writable: bool, trusted: bool) -> Result<u64, Errno> {
        let mut table = lock(&self.table);
        let (handles, last) = &mut *table;
        if handles.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        *last += 1;
        handles.insert(*last, Arc::new(Handle { file, writable, trusted, position: Mutex::new(Some(0)) }));
        Ok(*last)
    }

    /// The handle with that number.
    pub fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        lock(&self.table).0.get(&number).cloned().ok_or(Errno::BADF)
    }

    /// Closes a handle, once the requests that use it have ended.
    pub fn remove(&self, number: u64) {
        let gone = lock(&self.table).0.remove(&number);
        drop(gone);
    }

    /// Closes all handles. Numbers are not used again, so that none means two
    /// files.
    pub fn clear(&self) {
        let gone = std::mem::take(&mut lock(&self.table).0);
        drop(gone);
    }
}
