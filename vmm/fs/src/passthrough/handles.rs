//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use super::nodes::lock;
use crate::Errno;

/// One of them.
#[derive(Debug)]
pub struct Handle {
    /// The open file.
    pub file: OwnedFd,
    /// It may be written.
    pub writable: bool,
    /// It is a trusted volume's.
    pub trusted: bool,
    /// Where the next read of a directory goes on by itself; `None` if it has
    /// to be sought. Held while the directory is read.
    pub position: Mutex<Option<u64>>,
}

/// All of them, by the numbers that the guest has.
#[derive(Debug)]
pub struct Handles {
    limit: usize,
    table: Mutex<(HashMap<u64, Arc<Handle>>, u64)>,
}

impl Handles {
    /// At most `limit` of them.
    pub fn new(limit: usize) -> Self {
        Self { limit, table: Mutex::default() }
    }

    /// Keeps an open file; answers its number.
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

    /// The one of that number.
    pub fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        lock(&self.table).0.get(&number).cloned().ok_or(Errno::BADF)
    }

    /// Closes one, once whoever works with it has done so.
    pub fn remove(&self, number: u64) {
        let gone = lock(&self.table).0.remove(&number);
        drop(gone);
    }

    /// Closes all. Numbers go on, so that none means two files.
    pub fn clear(&self) {
        let gone = std::mem::take(&mut lock(&self.table).0);
        drop(gone);
    }
}
