//! Records of every release still read: they are files beside the code that are
//! never changed.

use std::fmt::Debug;

use husk_base::record::{self, Durability};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::*;

/// Every value of a record, with the way to it.
fn values(record: &Value, path: &str, all: &mut Vec<(String, Value)>) {
    match record {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                // As RFC 6901 has it.
                let name = name.replace('~', "~0").replace('/', "~1");
                values(value, &format!("{path}/{name}"), all);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            list.iter().enumerate().for_each(|(place, value)| values(value, &format!("{path}/{place}"), all));
        }
        value => all.push((path.to_owned(), value.clone())),
    }
}

/// Reads a record of an earlier release, and writes it as this one does: it says the
/// same, and nothing of it is unknown.
fn reads<T: Serialize + DeserializeOwned + Debug>(golden: &str) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("record.json");
    std::fs::write(&path, golden).unwrap();
    let (known, _) = record::read::<T>(&path).unwrap();
    record::write(&path, &known, &record::Unknown::default(), Durability::Whole).unwrap();
    let written: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(written["version"], record::VERSION);
    let mut said = Vec::new();
    values(&serde_json::from_str(golden).unwrap(), "", &mut said);
    assert!(said.len() > 10);
    for (path, value) in said {
        assert_eq!(written.pointer(&path), Some(&value), "{path}");
    }
    known
}

#[test]
fn pods_of_every_release_read() {
    let pod: SandboxRecord = reads(include_str!("../golden/pod-0.1.0.json"));
    assert_eq!((pod.kind, pod.phase), (Kind::Vm, Phase::Ready));
    assert_eq!((pod.oom_kills, pod.image_slots), (0, Some(8)));
    let host: SandboxRecord = reads(include_str!("../golden/host-pod-0.1.0.json"));
    assert_eq!((host.kind, host.phase), (Kind::Host, Phase::NotReady));
}

#[test]
fn containers_of_every_release_read() {
    let running: ContainerRecord = reads(include_str!("../golden/container-0.1.0.json"));
    assert_eq!(running.state, State::Running);
    assert_eq!(running.disks().map(|(slot, _)| slot).collect::<Vec<_>>(), ["image-0", "image-1"]);
    let exited: ContainerRecord = reads(include_str!("../golden/exited-container-0.1.0.json"));
    let State::Exited(exit) = &exited.state else { panic!("{:?}", exited.state) };
    assert_eq!((exit.code, exit.reason.as_str()), (137, "OOMKilled"));
}
