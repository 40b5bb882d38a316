//! CNI network configurations: what `/etc/cni/net.d` says.
//!
//! The file that comes first in lexical order decides, as with other
//! container runtimes. A broken first file is an error and not a reason to
//! take the next one: pods would silently land on another network.
//! See the CNI specification, section 1.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use husk_base::{FileError, text_file};

/// CNI versions that configurations may have, oldest first. A file without a
/// version means 0.1.0.
const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Most bytes of a configuration file; real ones have a few thousand.
const MAX_FILE: u64 = 1024 * 1024;

/// Most plugins in a chain.
const MAX_PLUGINS: usize = 32;

/// There is no configuration to use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory has no configuration, or is not there.
    #[error("no CNI configuration in {0}: put a .conflist there")]
    None(PathBuf),
    /// The directory or file cannot be read.
    #[error(transparent)]
    Read(#[from] FileError),
    /// The file is not a CNI configuration.
    #[error("CNI configuration {path}: {reason}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
}

/// A named chain of plugins. Also the form in which it is recorded with a
/// pod, so that the pod can be disconnected after the file has changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NetworkList {
    /// Name of the network.
    pub name: String,
    /// CNI version that the plugins are asked to speak.
    pub cni_version: String,
    /// The plugins' configurations as they stand in the file, in order.
    pub plugins: Vec<Map<String, Value>>,
    /// CHECK is not to be called.
    #[serde(default)]
    pub disable_check: bool,
    /// GC is not to be called.
    #[serde(default)]
    pub disable_gc: bool,
}

impl NetworkList {
    /// Whether plugins speak at least this version of CNI.
    pub(super) fn speaks(&self, version: &str) -> bool {
        let place = |version: &str| VERSIONS.iter().position(|known| *known == version);
        place(&self.cni_version) >= place(version)
    }
}

/// Loads the configuration that decides in `dir`.
///
/// # Errors
/// When there is none, or the first one is broken.
pub fn load(dir: &Path) -> Result<NetworkList, Error> {
    let path = first_file(dir)?;
    let text = text_file::read(&path, MAX_FILE).map_err(FileError::at("read CNI configuration", &path))?;
    let list = path.extension().is_some_and(|extension| extension == "conflist");
    parse(text.as_bytes(), list).map_err(|reason| Error::Invalid { path: path.clone(), reason })
}

fn first_file(dir: &Path) -> Result<PathBuf, Error> {
    let read = |source| FileError { stage: "list CNI configurations", path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::None(dir.to_owned())),
        entries => entries.map_err(read)?,
    };
    let mut first: Option<PathBuf> = None;
    for entry in entries {
        let path = entry.map_err(read)?.path();
        let configuration = path
            .extension()
            .is_some_and(|extension| ["conflist", "conf", "json"].iter().any(|known| extension == *known));
        if configuration && path.is_file() && first.as_ref().is_none_or(|first| path < *first) {
            first = Some(path);
        }
    }
    first.ok_or_else(|| Error::None(dir.to_owned()))
}

/// Parses a file; `list` tells a `.conflist` from a single plugin's `.conf`,
/// which becomes a chain of one. The error is the reason in words.
pub(super) fn parse(bytes: &[u8], list: bool) -> Result<NetworkList, String> {
    let mut file: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let name = match file.get("name") {
        Some(Value::String(name)) if is_identifier(name) => name.clone(),
        Some(name) => return Err(format!("{name} is no name for a network: use letters, digits, _ . and -")),
        None => return Err("the network has no name".into()),
    };
    let cni_version = version(&file)?;
    let (disable_check, disable_gc) = (flag(&file, "disableCheck")?, flag(&file, "disableGC")?);
    let plugins = if list {
        match file.remove("plugins") {
            Some(Value::Array(plugins)) => plugins
                .into_iter()
                .map(|plugin| match plugin {
                    Value::Object(plugin) => Ok(plugin),
                    other => Err(format!("plugin {other} is not an object")),
                })
                .collect::<Result<Vec<_>, _>>()?,
            _ => return Err("the network has no list of plugins".into()),
        }
    } else {
        vec![file]
    };
    if plugins.is_empty() || plugins.len() > MAX_PLUGINS {
        return Err(format!("{} plugins, where 1 to {MAX_PLUGINS} are wanted", plugins.len()));
    }
    let network = NetworkList { name, cni_version, plugins, disable_check, disable_gc };
    for plugin in &network.plugins {
        plugin_type(plugin)?;
    }
    Ok(network)
}

/// Name of the plugin's program. A separator in it would start a program
/// outside of the plugin directories.
pub(super) fn plugin_type(plugin: &Map<String, Value>) -> Result<&str, String> {
    match plugin.get("type") {
        Some(Value::String(kind)) if is_identifier(kind) => Ok(kind),
        Some(kind) => Err(format!("{kind} is no type of plugin")),
        None => Err("a plugin has no type".into()),
    }
}

/// The version to speak: `cniVersions` (CNI 1.1) offers several, of which the
/// newest known one is taken.
fn version(file: &Map<String, Value>) -> Result<String, String> {
    let place = |version: &str| VERSIONS.iter().position(|known| *known == version);
    let single = match file.get("cniVersion") {
        None => None,
        Some(Value::String(version)) => Some(version.as_str()),
        Some(other) => return Err(format!("cniVersion {other} is not a string")),
    };
    let many = file.get("cniVersions").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let offered = many.iter().filter_map(Value::as_str).chain(single);
    let newest = offered.filter_map(place).max().and_then(|place| VERSIONS.get(place));
    match (newest, single) {
        (Some(version), _) => Ok((*version).to_owned()),
        (None, None) if many.is_empty() => Ok("0.1.0".to_owned()),
        (None, single) => Err(format!(
            "CNI version {} is not known here: use one from 0.3.1 to 1.1.0",
            single.unwrap_or("in cniVersions")
        )),
    }
}

/// A flag of the list: a boolean, or its name (section 1).
fn flag(file: &Map<String, Value>, name: &str) -> Result<bool, String> {
    match file.get(name) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(Value::String(flag)) if flag == "true" => Ok(true),
        Some(Value::String(flag)) if flag == "false" => Ok(false),
        Some(other) => Err(format!("{name} is {other}, which is neither true nor false")),
    }
}

/// Whether CNI allows a text as a network name and as a container id (section 2).
pub(super) fn is_identifier(text: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_file_in_lexical_order_decides() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(dir.path()), Err(Error::None(_))));
        std::fs::write(dir.path().join("05-notes.txt"), "not a configuration").unwrap();
        std::fs::write(
            dir.path().join("20-b.conflist"),
            r#"{"cniVersion":"1.0.0","name":"b","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#,
        )
        .unwrap();
        assert_eq!(load(dir.path()).unwrap().name, "b");
        std::fs::write(dir.path().join("10-a.conf"), r#"{"name":"a","cniVersion":"0.3.1","type":"ptp"}"#)
            .unwrap();
        let network = load(dir.path()).unwrap();
        assert_eq!((network.name.as_str(), network.plugins.len()), ("a", 1));
    }

    #[test]
    fn a_broken_first_file_is_named_and_not_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("10-a.conflist"), "{").unwrap();
        std::fs::write(dir.path().join("20-b.conf"), r#"{"name":"b","type":"ptp"}"#).unwrap();
        let error = load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("10-a.conflist"), "{error}");
    }

    #[test]
    fn a_missing_directory_says_what_to_do() {
        let error = load(Path::new("/nonexistent/net.d")).unwrap_err().to_string();
        assert_eq!(error, "no CNI configuration in /nonexistent/net.d: put a .conflist there");
    }

    #[test]
    fn versions_are_chosen_and_unknown_ones_refused() {
        let version = |text: &str| {
            let file = format!(r#"{{"name":"n",{text}"plugins":[{{"type":"t"}}]}}"#);
            parse(file.as_bytes(), true).map(|network| network.cni_version)
        };
        assert_eq!(version("").unwrap(), "0.1.0");
        assert_eq!(version(r#""cniVersion":"1.1.0","#).unwrap(), "1.1.0");
        assert_eq!(version(r#""cniVersions":["0.4.0","1.0.0","9.0.0"],"#).unwrap(), "1.0.0");
        assert!(version(r#""cniVersion":"2.0.0","#).unwrap_err().contains("2.0.0"));
        assert!(version(r#""cniVersion":7,"#).is_err());
    }

    #[test]
    fn a_plugin_outside_of_the_plugin_directories_is_refused() {
        for file in [
            r#"{"name":"n","plugins":[{"type":"../../bin/sh"}]}"#,
            r#"{"name":"n","plugins":[{"type":""}]}"#,
            r#"{"name":"n","plugins":[{}]}"#,
            r#"{"name":"n","plugins":[7]}"#,
            r#"{"name":"n","plugins":[]}"#,
            r#"{"name":"n"}"#,
            r#"{"name":"../n","plugins":[{"type":"t"}]}"#,
            r#"{"plugins":[{"type":"t"}]}"#,
        ] {
            assert!(parse(file.as_bytes(), true).is_err(), "{file}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in any::<Vec<u8>>(), list in any::<bool>()) {
            let _ = parse(&bytes, list);
        }

        #[test]
        fn whatever_parses_has_only_safe_names(name in "[./a-z-]{0,8}", kind in "[./a-z-]{0,8}") {
            let file = serde_json::json!({"name": name, "plugins": [{"type": kind}]}).to_string();
            if let Ok(network) = parse(file.as_bytes(), true) {
                prop_assert!(!network.name.contains('/') && !kind.contains('/') && !kind.starts_with('.'));
            }
        }
    }
}
