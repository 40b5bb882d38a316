//! Holds `docs/config-reference.md` and `docs/config.toml` to the code: each key is documented, with its default.

use std::collections::BTreeMap;
use std::path::Path;

use husk_vmm_api::RateLimit;
use serde_json::Value;

use super::handler::installed;
use super::*;

/// Defaults by key, by the heading under which the page has them.
type Tables = BTreeMap<String, BTreeMap<String, String>>;

fn document(name: &str) -> String {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = here.ancestors().map(|folder| folder.join("docs")).find(|docs| docs.join(name).is_file());
    std::fs::read_to_string(docs.unwrap().join(name)).unwrap()
}

/// `planTimeout` as the file has it: `plan_timeout`.
fn snake_case(key: &str) -> String {
    let mut text = String::new();
    for letter in key.chars() {
        if letter.is_ascii_uppercase() {
            text.push('_');
        }
        text.push(letter.to_ascii_lowercase());
    }
    text
}

/// A value as TOML has it; a value that is not set, and a table, is "none".
fn toml_of(value: &Value) -> String {
    let prefix = installed("").display().to_string();
    match value {
        Value::Null | Value::Object(_) => "none".into(),
        Value::Array(items) => format!("[{}]", items.iter().map(toml_of).collect::<Vec<_>>().join(", ")),
        Value::String(text) => format!("{:?}", text.replace(prefix.trim_end_matches('/'), "PREFIX")),
        other => other.to_string(),
    }
}

fn table_of(value: &impl Serialize) -> BTreeMap<String, String> {
    let value = serde_json::to_value(value).unwrap();
    value.as_object().unwrap().iter().map(|(key, value)| (snake_case(key), toml_of(value))).collect()
}

/// The keys that handlers of both kinds have, and those of each kind alone.
fn handlers_in_code() -> [(&'static str, BTreeMap<String, String>); 3] {
    let (mut vm, mut host) = (table_of(&VmHandler::default()), table_of(&HostHandler::default()));
    let mut both: BTreeMap<_, _> = vm.extract_if(.., |key, _| host.contains_key(key)).collect();
    let of_host: BTreeMap<_, _> = host.extract_if(.., |key, _| both.contains_key(key)).collect();
    assert_eq!(both, of_host, "a key that both have has one default");
    // These two choose the handler, and are not kept in it.
    for (key, default) in [("kind", "\"vm\""), ("enabled", "true")] {
        assert_eq!(both.insert(key.into(), default.into()), None);
    }
    [("[handlers.NAME]", both), ("Kind vm", vm), ("Kind host", host)]
}

fn in_code() -> Tables {
    let config = Config::default();
    let mut top = table_of(&config);
    for table in ["network", "images", "streaming", "cdi", "handlers"] {
        assert!(top.remove(table).is_some(), "{table}");
    }
    let hook = Hook { path: "/hook".into(), args: Vec::new(), env: Vec::new(), timeout_seconds: None };
    let mut hook = table_of(&hook);
    hook.insert("path".into(), "required".into());
    let others = [
        ("Top level", top),
        ("[network]", table_of(&config.network)),
        ("[images]", table_of(&config.images)),
        ("[streaming]", table_of(&config.streaming)),
        ("[cdi]", table_of(&config.cdi)),
        ("[handlers.NAME.limits]", table_of(&Limits::default())),
        ("[handlers.NAME.limits.DEVICE]", table_of(&RateLimit::default())),
        ("[[handlers.NAME.hooks.STAGE]]", hook),
    ];
    let tables = others.into_iter().chain(handlers_in_code());
    tables.map(|(name, keys)| (name.to_owned(), keys)).collect()
}

/// The rows of the page's tables, by the headings above them.
fn in_reference() -> Tables {
    let mut tables = Tables::new();
    let mut heading = String::new();
    for line in document("config-reference.md").lines() {
        if let Some(text) = line.strip_prefix("## ").or_else(|| line.strip_prefix("### ")) {
            heading = text.replace('`', "");
        }
        let cells: Vec<_> = line.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        if let ["", key, default, meaning, ..] = cells[..]
            && line.starts_with("| `")
        {
            assert!(!meaning.is_empty(), "{key} has no meaning");
            let seen = tables.entry(heading.clone()).or_default().insert(key.to_owned(), default.to_owned());
            assert_eq!(seen, None, "{heading}: {key} is there twice");
        }
    }
    tables
}

#[test]
fn the_reference_has_every_key_with_its_default() {
    let (code, page) = (in_code(), in_reference());
    for (table, keys) in &code {
        assert_eq!(page.get(table), Some(keys), "docs/config-reference.md, {table}: the page, then the code");
    }
    assert_eq!(page.len(), code.len(), "tables of the page: {:?}", page.keys());
}

#[test]
fn the_commented_values_of_the_installed_file_are_the_defaults() {
    let installed_file = document("config.toml");
    let settings = installed_file.lines().filter_map(|line| line.strip_prefix("# ")).filter(|line| {
        let is_key = |word: &str| word.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_');
        (line.starts_with('[') && !line.starts_with("[["))
            || line.split_once(" = ").is_some_and(|(key, _)| is_key(key))
    });
    let config = read::config(&settings.collect::<Vec<_>>().join("\n")).unwrap();
    let of = |config: &Config| serde_json::to_value(config).unwrap();
    assert_eq!(of(&config), of(&Config::default()), "docs/config.toml, then the code");
    for key in in_code().values().flat_map(BTreeMap::keys) {
        let named = installed_file.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'));
        let optional = ["env", "timeout_seconds"].contains(&key.as_str());
        assert!(
            optional || named.into_iter().any(|word| word == key),
            "docs/config.toml does not name {key}"
        );
    }
}
