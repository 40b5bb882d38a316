//! Output of the verbs that list and show things: tables, JSON, YAML and templates.

use std::io::Write;

use serde_json::{Map, Value};

mod filter;
mod table;
mod template;
pub mod time;
pub mod units;

pub use filter::{Filter, labels_match};
pub use table::table;
pub use template::Template;

/// One item of a list: the values of its fields by name.
pub type Item = Map<String, Value>;

/// The form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// A table for people.
    #[default]
    Table,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
}

/// The options that choose the form of a list.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// The form of the output.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Form,
    /// Print each item as the template says: `{{.Field}}`, `{{json .Field}}`, `{{json .}}`, with
    /// `\t` and `\n`. `-o json` shows the names of the fields. `json` and `table TEMPLATE` work as
    /// docker's.
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "output")]
    pub format: Option<Template>,
}

/// A column of a table: its heading, and the field that it shows.
pub type Column = (&'static str, &'static str);

/// Prints a list in the form that is asked for; `quiet` prints the field `ID` alone.
///
/// # Errors
/// A template that names an unknown field, or an output that cannot be written.
pub fn list(options: &Options, quiet: bool, columns: &[Column], items: Vec<Item>) -> anyhow::Result<()> {
    print(&render(options, quiet, columns, items)?)
}

/// The text of a list.
fn render(options: &Options, quiet: bool, columns: &[Column], items: Vec<Item>) -> anyhow::Result<String> {
    if quiet {
        return Ok(items.iter().map(|item| format!("{}\n", cell(item.get("ID")))).collect());
    }
    if let Some(template) = &options.format {
        return template.render_all(&items);
    }
    match options.output {
        Form::Json | Form::Yaml => document(options.output, &items.into()),
        Form::Table => {
            let head: Vec<String> = columns.iter().map(|(heading, _)| (*heading).to_owned()).collect();
            let row = |item: &Item| columns.iter().map(|(_, field)| cell(item.get(*field))).collect();
            Ok(table(&head, &items.iter().map(row).collect::<Vec<Vec<String>>>()))
        }
    }
}

/// Prints one thing as a document, or as the template says.
///
/// # Errors
/// As for [`list`].
pub fn one(options: &Options, value: &Value) -> anyhow::Result<()> {
    match &options.format {
        Some(template) => print(&(template.render(value)? + "\n")),
        None => print(&document(options.output, value)?),
    }
}

/// A JSON or YAML document; a table of a document is its JSON.
///
/// # Errors
/// A value that YAML cannot say.
pub fn document(form: Form, value: &Value) -> anyhow::Result<String> {
    match form {
        Form::Yaml => Ok(serde_yaml_ng::to_string(value)?),
        Form::Json | Form::Table => Ok(serde_json::to_string_pretty(value)? + "\n"),
    }
}

/// A value as text: a string as it is, nothing for null, everything else as JSON.
pub fn cell(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// Writes to the standard output.
///
/// # Errors
/// The kernel's error, for example because the reader of a pipe has gone.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    output.write_all(text.as_bytes())?;
    Ok(output.flush()?)
}

/// The first characters of an id, which people use as the id.
pub fn short(id: &str) -> &str {
    id.get(..13).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn items() -> Vec<Item> {
        let item = |value: Value| value.as_object().cloned().unwrap();
        vec![item(json!({"ID": "a", "Name": "web", "Size": 7})), item(json!({"ID": "b", "Name": null}))]
    }

    fn rendered(options: &Options, quiet: bool) -> String {
        render(options, quiet, &[("NAME", "Name"), ("SIZE", "Size")], items()).unwrap()
    }

    #[test]
    fn a_list_has_the_form_that_is_asked_for() {
        let form = |output| Options { output, format: None };
        assert_eq!(rendered(&form(Form::Table), false), "NAME  SIZE\nweb   7\n\n");
        assert_eq!(rendered(&form(Form::Table), true), "a\nb\n");
        let json: Value = serde_json::from_str(&rendered(&form(Form::Json), false)).unwrap();
        assert_eq!(json[0]["Size"], 7);
        assert!(rendered(&form(Form::Yaml), false).starts_with("- ID: a\n  Name: web\n"));
        let format = Some("{{.ID}}={{.Name}}".parse().unwrap());
        assert_eq!(rendered(&Options { output: Form::Table, format }, false), "a=web\nb=\n");
    }
}
