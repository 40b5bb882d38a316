//! The records on disk of each pod's network, so that it can be undone.
//!
//! `<cache_dir>/<sandbox id>/intent.json` is written and synced before
//! anything is made: after a crash at any instruction, or a power cut, it says
//! which plugins to call with which configuration. IPAM plugins keep leases on
//! disk, so this matters even where the netns is long gone. `result.json`,
//! what the plugins answered, comes after and is a help for them and not a
//! need: it is not synced.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use husk_base::FileError;

use super::conflist::{NetworkList, is_identifier};

const INTENT: &str = "intent.json";
const RESULT: &str = "result.json";

/// Everything that DEL needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Intent {
    /// The sandbox.
    pub sandbox_id: String,
    /// The file that pins the sandbox's netns.
    pub netns: PathBuf,
    /// The interface's name, `CNI_IFNAME`.
    pub interface: String,
    /// The pod's names for plugins, `CNI_ARGS`.
    pub args: String,
    /// Capability arguments: name of the capability to its value.
    pub capabilities: Map<String, Value>,
    /// The configuration as it was when the pod came.
    pub network: NetworkList,
}

/// The record of a sandbox, as far as there is one.
#[derive(Debug, PartialEq)]
pub enum Recorded {
    /// Nothing at all.
    Nothing,
    /// There is a record, but its intent was never completed or is damaged.
    Unreadable(String),
    /// The intent, and the plugins' result if they got that far.
    Intent(Box<Intent>, Option<Value>),
}

/// The directory of records.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
}

impl Records {
    /// Records in `directory`, which is made when it is needed.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Reserves the record of a sandbox and makes its intent durable.
    ///
    /// # Errors
    /// `AlreadyExists` when there is a record, else the file system's.
    pub fn begin(&self, intent: &Intent) -> Result<(), FileError> {
        let directory = self.of(&intent.sandbox_id)?;
        fs::create_dir_all(&self.directory).map_err(FileError::at("make folder", &self.directory))?;
        fs::create_dir(&directory)
            .map_err(FileError::at("make the record of a pod's network", &directory))?;
        let written = self.write_intent(&directory, intent);
        if written.is_err() {
            // A full disk must not leave a record of nothing.
            let _ = fs::remove_dir_all(&directory);
        }
        written.map_err(FileError::at("write the record of a pod's network", &directory))
    }

    fn write_intent(&self, directory: &Path, intent: &Intent) -> io::Result<()> {
        let temporary = directory.join("intent.tmp");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(intent)?)?;
        file.sync_all()?;
        fs::rename(&temporary, directory.join(INTENT))?;
        File::open(directory)?.sync_all()?;
        File::open(&self.directory)?.sync_all()
    }

    /// Adds the plugins' result.
    ///
    /// # Errors
    /// The file system's.
    pub fn complete(&self, sandbox_id: &str, result: &Value) -> Result<(), FileError> {
        let directory = self.of(sandbox_id)?;
        let temporary = directory.join("result.tmp");
        serde_json::to_vec(result)
            .map_err(io::Error::from)
            .and_then(|bytes| fs::write(&temporary, bytes))
            .and_then(|()| fs::rename(&temporary, directory.join(RESULT)))
            .map_err(FileError::at("write what the CNI plugins answered", &directory))
    }

    /// Reads the record of a sandbox.
    ///
    /// # Errors
    /// The file system's, other than that there is no record.
    pub fn read(&self, sandbox_id: &str) -> Result<Recorded, FileError> {
        let directory = self.of(sandbox_id)?;
        self.read_in(&directory).map_err(FileError::at("read the record of a pod's network", &directory))
    }

    fn read_in(&self, directory: &Path) -> io::Result<Recorded> {
        let bytes = match fs::read(directory.join(INTENT)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(match directory.try_exists()? {
                    true => Recorded::Unreadable("its intent is missing".into()),
                    false => Recorded::Nothing,
                });
            }
            Err(error) => return Err(error),
        };
        match serde_json::from_slice(&bytes) {
            Err(error) => Ok(Recorded::Unreadable(error.to_string())),
            Ok(intent) => {
                let result = fs::read(directory.join(RESULT)).ok();
                let result = result.and_then(|bytes| serde_json::from_slice(&bytes).ok());
                Ok(Recorded::Intent(Box::new(intent), result))
            }
        }
    }

    /// Forgets a sandbox. The intent goes last, with the directory.
    ///
    /// # Errors
    /// The file system's, other than that there is no record.
    pub fn remove(&self, sandbox_id: &str) -> Result<(), FileError> {
        let directory = self.of(sandbox_id)?;
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(FileError::at("remove the record of a pod's network", &directory)(error))
            }
            _ => Ok(()),
        }
    }

    /// Ids of all sandboxes with a record.
    ///
    /// # Errors
    /// The file system's.
    pub fn ids(&self) -> Result<Vec<String>, FileError> {
        let failed = |source| {
            let path = self.directory.clone();
            FileError { stage: "list the records of pods' networks", path, source }
        };
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut ids = Vec::new();
        for entry in entries {
            if let Ok(id) = entry.map_err(failed)?.file_name().into_string()
                && is_identifier(&id)
            {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// Directory of a sandbox. Ids come from clients: one with a separator in
    /// it would lead elsewhere.
    fn of(&self, sandbox_id: &str) -> Result<PathBuf, FileError> {
        if is_identifier(sandbox_id) && sandbox_id.len() <= 128 {
            return Ok(self.directory.join(sandbox_id));
        }
        let path = Path::new(sandbox_id);
        Err(FileError::at("sandbox id", path)(io::Error::new(
            io::ErrorKind::InvalidInput,
            "letters, digits, _ . and - are wanted, at most 128",
        )))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn intent(id: &str) -> Intent {
        Intent {
            sandbox_id: id.into(),
            netns: "/run/netns/husk-a".into(),
            interface: "eth0".into(),
            args: "IgnoreUnknown=1".into(),
            capabilities: Map::new(),
            network: NetworkList { name: "n".into(), cni_version: "1.0.0".into(), ..NetworkList::default() },
        }
    }

    #[test]
    fn a_record_is_there_from_begin_to_remove() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("network"));
        assert_eq!(records.ids().unwrap(), Vec::<String>::new());
        assert_eq!(records.read("a1").unwrap(), Recorded::Nothing);
        records.begin(&intent("a1")).unwrap();
        assert_eq!(records.begin(&intent("a1")).unwrap_err().source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(records.read("a1").unwrap(), Recorded::Intent(Box::new(intent("a1")), None));
        records.complete("a1", &json!({"ips": []})).unwrap();
        let full = Recorded::Intent(Box::new(intent("a1")), Some(json!({"ips": []})));
        assert_eq!(records.read("a1").unwrap(), full);
        assert_eq!(records.ids().unwrap(), ["a1"]);
        records.remove("a1").unwrap();
        records.remove("a1").unwrap();
        assert_eq!(records.read("a1").unwrap(), Recorded::Nothing);
    }

    #[test]
    fn a_torn_result_leaves_the_intent_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        records.begin(&intent("a1")).unwrap();
        fs::write(dir.path().join("a1").join(RESULT), "{\"ips\": [").unwrap();
        assert_eq!(records.read("a1").unwrap(), Recorded::Intent(Box::new(intent("a1")), None));
    }

    #[test]
    fn a_record_without_an_intent_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        fs::create_dir(dir.path().join("a1")).unwrap();
        assert!(matches!(records.read("a1").unwrap(), Recorded::Unreadable(_)));
        assert_eq!(records.ids().unwrap(), ["a1"]);
    }

    #[test]
    fn ids_cannot_lead_elsewhere() {
        let records = Records::new("/nonexistent".into());
        for id in ["", "..", "../a", "a/b", ".hidden"] {
            assert_eq!(records.read(id).unwrap_err().source.kind(), io::ErrorKind::InvalidInput, "{id}");
        }
    }
}
