//! Reads the configuration file.
//!
//! A handler's table is flat in the file, and mostly without `kind`, so no tag of serde's can
//! choose the variant. It is read in two steps: the keys that every handler has say what the
//! handler is, and the rest is read as that variant. Both read from the parsed document, which
//! knows the line of each value, so that errors show it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Visitor, value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::handler::built_in;
use crate::{Config, Handler, HostHandler, Kind, VmHandler};

/// The text of a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    /// The text is not TOML, or a key or a type is wrong.
    #[error("{0}")]
    Parse(#[from] Box<toml::de::Error>),
    /// A key that another handler has, or a value that cannot work.
    #[error("{0}")]
    Value(String),
}

/// The keys that say whether a table makes a handler, and which.
#[derive(Deserialize)]
#[serde(default)]
struct Selector {
    kind: Option<Kind>,
    enabled: bool,
}

impl Default for Selector {
    fn default() -> Self {
        Self { kind: None, enabled: true }
    }
}

/// The configuration that a file with this text makes.
pub(crate) fn config(text: &str) -> Result<Config, Problem> {
    let mut document = DeTable::parse(text).map_err(Box::new)?;
    let tables = document.get_mut().remove("handlers");
    let mut config: Config = deserialize(text, document)?;
    config.handlers = handlers(text, tables)?;
    config.check().map_err(Problem::Value)?;
    Ok(config)
}

/// The handlers that are enabled, by name. A file that changes one leaves the others as they are.
fn handlers(text: &str, tables: Option<Spanned<DeValue<'_>>>) -> Result<BTreeMap<String, Handler>, Problem> {
    let mut handlers = built_in();
    let Some(tables) = tables else { return Ok(handlers) };
    for (name, value) in table(tables, "handlers")?.into_inner() {
        let name = name.into_inner().into_owned();
        let table = table(value, &format!("handlers.{name}"))?;
        match handler(text, &name, table)? {
            Some(handler) => handlers.insert(name, handler),
            None => handlers.remove(&name),
        };
    }
    Ok(handlers)
}

fn table<'a>(value: Spanned<DeValue<'a>>, key: &str) -> Result<Spanned<DeTable<'a>>, Problem> {
    let span = value.span();
    match value.into_inner() {
        DeValue::Table(table) => Ok(Spanned::new(span, table)),
        other => Err(Problem::Value(format!("{key} is a table, not {}", other.type_str()))),
    }
}

/// The handler that a table makes; `None` for one that is not enabled.
fn handler(text: &str, name: &str, mut table: Spanned<DeTable<'_>>) -> Result<Option<Handler>, Problem> {
    let mut chosen = DeTable::new();
    for key in ["kind", "enabled"] {
        if let Some((key, value)) = table.get_mut().remove_entry(key) {
            chosen.insert(key, value);
        }
    }
    let Selector { kind, enabled } = deserialize(text, Spanned::new(table.span(), chosen))?;
    let kind = kind.unwrap_or(Kind::of(name));
    check_keys(name, kind, table.get_ref())?;
    let handler = match kind {
        Kind::Vm => Handler::Vm(deserialize(text, table)?),
        Kind::Host => Handler::Host(deserialize(text, table)?),
    };
    Ok(enabled.then_some(handler))
}

/// Refuses keys that only handlers of the other kind have: silence would make a client
/// believe that they count.
fn check_keys(name: &str, kind: Kind, table: &DeTable<'_>) -> Result<(), Problem> {
    let (own, foreign) = match kind {
        Kind::Vm => (keys::<VmHandler>(), keys::<HostHandler>()),
        Kind::Host => (keys::<HostHandler>(), keys::<VmHandler>()),
    };
    let is_foreign = |key: &&str| foreign.contains(key) && !own.contains(key);
    let wrong: Vec<_> = table.keys().map(|key| key.get_ref().as_ref()).filter(is_foreign).collect();
    if wrong.is_empty() {
        return Ok(());
    }
    let (this, other) = match kind {
        Kind::Vm => ("vm", "host"),
        Kind::Host => ("host", "vm"),
    };
    let wrong: Vec<_> = wrong.into_iter().map(|key| format!("`{key}`")).collect();
    Err(Problem::Value(format!(
        "handlers.{name}: only handlers of kind \"{other}\" have {}, and this one is of kind \"{this}\": remove what it \
         does not have, or set kind = \"{other}\"",
        wrong.join(", ")
    )))
}

/// Reads a table. An error shows the line of `text` that is wrong.
fn deserialize<T: DeserializeOwned>(
    text: &str,
    table: Spanned<DeTable<'_>>,
) -> Result<T, Box<toml::de::Error>> {
    T::deserialize(toml::Deserializer::from(table)).map_err(|mut error| {
        error.set_input(Some(text));
        Box::new(error)
    })
}

/// The keys that a struct is read from, as its `Deserialize` asks for them.
fn keys<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut keys: &'static [&'static str] = &[];
    // The answer is that there is nothing to read; the question is enough.
    let _ = T::deserialize(Asked(&mut keys));
    keys
}

/// A deserializer that has nothing, and keeps the keys that it was asked for.
struct Asked<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Asked<'_> {
    type Error = value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, value::Error> {
        Err(serde::de::Error::custom("there is nothing"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        keys: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, value::Error> {
        *self.0 = keys;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
