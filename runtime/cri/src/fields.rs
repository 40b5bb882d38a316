//! `docs/cri-fields.md` has every field of the interface's configurations, and
//! names tests that are there.

#![allow(clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const DOCUMENT: &str = include_str!("../../../docs/cri-fields.md");
const INTERFACE: &str = include_str!("../../../proto/cri/v1/api.proto");

/// Where the fields of each message are; those of the messages in them follow
/// from the interface, so that a new one is missed here.
const SECTIONS: [(&str, &[&str]); 6] = [
    ("PodSandboxConfig", &["PodSandboxConfig", "PodSandboxMetadata", "DNSConfig", "PortMapping"]),
    ("`linux`", &["LinuxPodSandboxConfig", "LinuxSandboxSecurityContext"]),
    (
        "ContainerConfig",
        &["ContainerConfig", "ContainerMetadata", "ImageSpec", "KeyValue", "Mount", "Device", "CDIDevice"],
    ),
    ("`linux.resources`", &["LinuxContainerResources", "HugepageLimit"]),
    (
        "`linux.security_context`",
        &["LinuxContainerSecurityContext", "Capability", "Int64Value", "SELinuxOption", "SecurityProfile"],
    ),
    ("`namespace_options`", &["NamespaceOption", "UserNamespace", "IDMapping"]),
];

/// Messages and their fields: name and type.
fn messages() -> BTreeMap<&'static str, Vec<(&'static str, &'static str)>> {
    let mut messages = BTreeMap::<_, Vec<_>>::new();
    let mut open = Vec::new();
    for line in INTERFACE.lines() {
        let line = line.split("//").next().unwrap_or_default().trim();
        let words: Vec<_> = line.split_whitespace().filter(|word| *word != "repeated").collect();
        match words.as_slice() {
            ["message" | "enum", name, ..] => open.push((words[0], name.trim_end_matches('{'))),
            [kind, name, "=", ..] if open.last().is_some_and(|(what, _)| *what == "message") => {
                messages.entry(open[open.len() - 1].1).or_default().push((*name, *kind));
            }
            // map<string, string> name = 1
            [_, _, name, "=", ..] if line.starts_with("map<") => {
                messages.entry(open[open.len() - 1].1).or_default().push((*name, ""));
            }
            _ => {}
        }
        if line.contains('}') {
            open.pop();
        }
    }
    messages
}

/// The tables' rows, below the name of their section.
fn rows() -> Vec<(&'static str, Vec<&'static str>)> {
    let mut section = "";
    let mut rows = Vec::new();
    for line in DOCUMENT.lines() {
        if line.starts_with('#') {
            section = line.trim_start_matches(['#', ' ']);
        } else if let Some(row) = line.strip_prefix("| ").filter(|row| !row.starts_with("---")) {
            rows.push((section, row.trim_end_matches('|').split('|').map(str::trim).collect()));
        }
    }
    rows.retain(|(_, cells): &(_, Vec<_>)| cells[0] != "field");
    rows
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
}

#[test]
fn every_field_has_a_place() {
    let messages = messages();
    let mut seen = BTreeSet::new();
    let mut reached = vec!["PodSandboxConfig", "ContainerConfig"];
    while let Some(message) = reached.pop() {
        if seen.insert(message) {
            let kinds = messages[message].iter().map(|(_, kind)| *kind);
            reached.extend(kinds.filter(|kind| messages.contains_key(kind) && !kind.starts_with("Windows")));
        }
    }
    // The two fields of this message are the headings of sections.
    seen.remove("LinuxContainerConfig");
    assert!(seen.len() > 15, "{seen:?}");
    for message in seen {
        let (section, _) = SECTIONS
            .iter()
            .find(|(_, messages)| messages.contains(&message))
            .unwrap_or_else(|| panic!("message {message} has no section"));
        let named: BTreeSet<_> = rows()
            .iter()
            .filter(|(place, _)| place == section)
            .flat_map(|(_, cells)| words(cells[0]))
            .collect();
        for (field, _) in &messages[message] {
            // A number is explained with the field that has it.
            let known = message == "Int64Value"
                || named.contains(field)
                || (*field == "linux" && DOCUMENT.contains("\n### `linux.resources`\n"));
            assert!(known, "{section}: no row for `{field}` of {message}");
        }
    }
}

/// The text of every file below a folder whose name ends so.
fn texts(folder: &Path, ending: &str) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            text.push_str(&texts(&path, ending));
        } else if path.to_string_lossy().ends_with(ending) {
            text.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
    text
}

#[test]
fn every_row_names_tests_that_are_there() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let pods = texts(&repository.join("tests/integration"), ".py");
    let units = ["runtime", "agent/src"].map(|place| texts(&repository.join(place), ".rs")).concat();
    let mut count = 0;
    for (section, cells) in rows() {
        if section == "Other requests" {
            continue;
        }
        assert_eq!(cells.len(), 4, "{section}: {}", cells[0]);
        let tests: Vec<_> = words(cells[3]).filter(|word| !word.is_empty()).collect();
        assert!(!tests.is_empty(), "{section}: no test for {}", cells[0]);
        for test in tests {
            let there = if test.starts_with("test_") {
                pods.contains(&format!("def {test}(self"))
            } else {
                units.contains(&format!("fn {test}("))
            };
            assert!(there, "{section}: there is no test {test}");
            count += 1;
        }
    }
    assert!(count > 40, "{count}");
}
