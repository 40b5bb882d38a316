//! Records on disk that more than one release of huskd reads and writes.
//!
//! A record says which version of its format it has. A huskd that knows this
//! version or a later one reads it; fields that it knows nothing of are kept and
//! written again. A later version is one that earlier releases would misunderstand:
//! they leave such a record alone.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::json;

/// The version of the records that this huskd writes. Those of releases that wrote
/// no version have the same format.
pub const VERSION: u32 = 1;

/// A record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read now.
    #[error("{0}")]
    File(#[from] io::Error),
    /// The record is of a later version.
    #[error("it is of version {0}, and this huskd knows versions up to {VERSION}: a later release wrote it")]
    Newer(u64),
    /// The file has something else than a record.
    #[error("{0}")]
    Damaged(String),
}

/// The fields of a record that this huskd does not know.
#[derive(Clone, Debug, Default)]
pub struct Unknown(Option<Value>);

/// Reads a record.
///
/// # Errors
/// [`ReadError`]. The record stays as it is in any case.
pub fn read<T: Serialize + DeserializeOwned>(path: &Path) -> Result<(T, Unknown), ReadError> {
    let damaged = |error: serde_json::Error| ReadError::Damaged(error.to_string());
    let value: Value = serde_json::from_slice(&std::fs::read(path)?).map_err(damaged)?;
    let version = value.get("version").and_then(Value::as_u64).unwrap_or_default();
    if version > u64::from(VERSION) {
        return Err(ReadError::Newer(version));
    }
    let record = T::deserialize(&value).map_err(damaged)?;
    let known = serde_json::to_value(Versioned { version: VERSION, record: &record }).map_err(damaged)?;
    Ok((record, Unknown(missing(&value, &known))))
}

/// How much a written record has to withstand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A power cut leaves the new record or the old one.
    Whole,
    /// A power cut leaves the new record, because its content was promised to a client.
    Acknowledged,
}

/// Replaces a record as a whole, with the fields of `unknown` added.
///
/// # Errors
/// The file system's; the old record is then unchanged.
pub fn write<T: Serialize>(
    path: &Path,
    record: &T,
    unknown: &Unknown,
    durability: Durability,
) -> io::Result<()> {
    let versioned = Versioned { version: VERSION, record };
    match &unknown.0 {
        None => json::write_json(path, &versioned)?,
        Some(unknown) => {
            let mut value = serde_json::to_value(&versioned)?;
            put_back(&mut value, unknown);
            json::write_json(path, &value)?;
        }
    }
    if durability == Durability::Acknowledged {
        let folder = path.parent().unwrap_or(Path::new("/"));
        std::fs::File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Keeps a copy of a record that cannot be used, for the person who repairs it.
///
/// # Errors
/// The file system's error.
pub fn keep_bad(path: &Path) -> io::Result<PathBuf> {
    let mut copy = path.as_os_str().to_owned();
    copy.push(".bad");
    let copy = PathBuf::from(copy);
    if !copy.exists() {
        std::fs::copy(path, &copy)?;
    }
    Ok(copy)
}

/// Reads as much as possible of a record that does not read: all of it, if it is JSON
/// all the same; else the first value with the name `wanted`, if that is
/// whole. `None` if there is no such value.
#[must_use]
pub fn salvage(path: &Path, wanted: &str) -> Option<Salvaged> {
    let text = std::fs::read(path).ok()?;
    if let Ok(value @ Value::Object(_)) = serde_json::from_slice(&text) {
        return Some(Salvaged::Whole(value));
    }
    let text = String::from_utf8_lossy(&text);
    let (_, rest) = text.split_once(&format!("\"{wanted}\":"))?;
    let first = serde_json::Deserializer::from_str(rest).into_iter().next()?;
    Some(Salvaged::Part(first.ok()?))
}

/// The result of [`salvage`].
#[derive(Debug, PartialEq)]
pub enum Salvaged {
    /// The whole record.
    Whole(Value),
    /// The value that was looked for.
    Part(Value),
}

#[derive(Serialize)]
struct Versioned<'a, T> {
    version: u32,
    #[serde(flatten)]
    record: &'a T,
}

/// The part of `read` that is not in `known`: objects are compared by name, lists
/// of the same length by place.
fn missing(read: &Value, known: &Value) -> Option<Value> {
    match (read, known) {
        (Value::Object(read), Value::Object(known)) => {
            let mut unknown = Map::new();
            for (name, value) in read {
                let more = match known.get(name) {
                    None => Some(value.clone()),
                    Some(known) => missing(value, known),
                };
                unknown.extend(more.map(|more| (name.clone(), more)));
            }
            (!unknown.is_empty()).then_some(Value::Object(unknown))
        }
        (Value::Array(read), Value::Array(known)) if read.len() == known.len() => {
            let unknown: Vec<_> = read.iter().zip(known).map(|(read, known)| missing(read, known)).collect();
            let any = unknown.iter().any(Option::is_some);
            any.then(|| unknown.into_iter().map(Option::unwrap_or_default).collect())
        }
        _ => None,
    }
}

/// Adds the result of [`missing`] to `known` again, wherever its place still exists.
fn put_back(known: &mut Value, unknown: &Value) {
    match (known, unknown) {
        (Value::Object(known), Value::Object(unknown)) => {
            for (name, value) in unknown {
                match known.get_mut(name) {
                    Some(known) => put_back(known, value),
                    None => {
                        known.insert(name.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(known), Value::Array(unknown)) if known.len() == unknown.len() => {
            known.iter_mut().zip(unknown).for_each(|(known, unknown)| put_back(known, unknown));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Pod {
        name: String,
        volumes: Vec<Volume>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Volume {
        path: String,
    }

    fn of(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pod.json");
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn fields_of_another_release_survive_at_any_depth() {
        let record = json!({
            "name": "web",
            "volumes": [{ "path": "/a" }, { "path": "/b", "speed": 3 }],
            "of_the_future": { "x": [1, 2] },
        });
        let (_folder, path) = of(&record.to_string());
        let (mut pod, unknown) = read::<Pod>(&path).unwrap();
        pod.name = "changed".into();
        write(&path, &pod, &unknown, Durability::Acknowledged).unwrap();
        let written: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let mut expected = record;
        expected["name"] = "changed".into();
        expected["version"] = VERSION.into();
        assert_eq!(written, expected);
    }

    #[test]
    fn a_record_of_a_later_version_is_not_read() {
        let (_folder, path) = of(&format!(r#"{{"version":{},"name":"web","volumes":[]}}"#, VERSION + 1));
        assert!(matches!(read::<Pod>(&path), Err(ReadError::Newer(2))));
        assert!(matches!(salvage(&path, "name"), Some(Salvaged::Whole(_))));
    }

    #[test]
    fn what_does_not_read_still_tells_what_it_can() {
        let (_folder, path) = of(r#"{"version":1,"name":{"of":"web","n":1},"volumes":[{"pa"#);
        assert!(matches!(read::<Pod>(&path), Err(ReadError::Damaged(_))));
        assert_eq!(salvage(&path, "name"), Some(Salvaged::Part(json!({ "of": "web", "n": 1 }))));
        assert_eq!(salvage(&path, "volumes"), None);
        let copy = keep_bad(&path).unwrap();
        assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&path).unwrap());
        std::fs::write(&path, "worse").unwrap();
        keep_bad(&path).unwrap();
        assert_ne!(std::fs::read(&copy).unwrap(), b"worse", "the first copy stays");
        for text in ["", "\0\0\0", "[]"] {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(read::<Pod>(&path), Err(ReadError::Damaged(_))), "{text:?}");
            assert_eq!(salvage(&path, "name"), None);
        }
    }
}
