//! Templates of `--format`: the part of Go's templates that people use with docker.
//!
//! A template is text with actions: `{{.Field}}`, `{{.Field.Inner}}` and `{{.}}` print a value,
//! `{{json …}}` prints it as JSON. `\t` and `\n` are a tab and a line's end.

use std::str::FromStr;

use anyhow::bail;
use serde_json::Value;

use super::{Item, cell, table};

/// A template that has been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
    /// Whether tabs separate the columns of a table with a heading.
    as_table: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// The path to a value, and whether it is printed as JSON.
    Value {
        path: Vec<String>,
        json: bool,
    },
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "json" {
            return Ok(Self { parts: vec![Part::Value { path: Vec::new(), json: true }], as_table: false });
        }
        let (text, as_table) = match text.strip_prefix("table ") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        let (mut parts, mut rest) = (Vec::new(), text.as_str());
        while let Some((before, action)) = rest.split_once("{{") {
            let (action, after) = action.split_once("}}").ok_or("`{{` without `}}`")?;
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            parts.push(value(action)?);
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self { parts, as_table })
    }
}

/// Reads the inside of an action.
fn value(action: &str) -> Result<Part, String> {
    let unknown = || format!("`{{{{{action}}}}}` is not known: `.Field`, `json .Field` and `json .` are");
    let mut words = action.split_whitespace();
    let (json, path) = match (words.next(), words.next(), words.next()) {
        (Some("json"), Some(path), None) => (true, path),
        (Some(path), None, None) => (false, path),
        _ => return Err(unknown()),
    };
    let path = path.strip_prefix('.').ok_or_else(unknown)?;
    let names: Vec<String> = path.split('.').filter(|name| !name.is_empty()).map(str::to_owned).collect();
    if names.iter().any(|name| !name.chars().all(|letter| letter.is_alphanumeric() || "_-".contains(letter)))
    {
        return Err(unknown());
    }
    Ok(Part::Value { path: names, json })
}

impl Template {
    /// The text of all items, a line for each.
    ///
    /// # Errors
    /// A field that the items do not have.
    pub fn render_all(&self, items: &[Item]) -> anyhow::Result<String> {
        let lines: Vec<String> =
            items.iter().map(|item| self.render(&item.clone().into())).collect::<Result<_, _>>()?;
        if self.as_table {
            let columns = |line: &str| line.split('\t').map(str::to_owned).collect::<Vec<_>>();
            let rows: Vec<Vec<String>> = lines.iter().map(|line| columns(line)).collect();
            return Ok(table(&columns(&self.heading()), &rows));
        }
        Ok(lines.into_iter().map(|line| line + "\n").collect())
    }

    /// The text of one value.
    ///
    /// # Errors
    /// A field that the value does not have.
    pub fn render(&self, value: &Value) -> anyhow::Result<String> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Text(part) => text.push_str(part),
                Part::Value { path, json: true } => text.push_str(&look_up(value, path)?.to_string()),
                Part::Value { path, json: false } => text.push_str(&cell(Some(look_up(value, path)?))),
            }
        }
        Ok(text)
    }

    /// The heading of a table: the names of the fields.
    fn heading(&self) -> String {
        let heading = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Value { path, .. } => path.last().map(|name| name.to_uppercase()).unwrap_or_default(),
        };
        self.parts.iter().map(heading).collect()
    }
}

fn look_up<'a>(value: &'a Value, path: &[String]) -> anyhow::Result<&'a Value> {
    let mut found = value;
    for name in path {
        let Value::Object(fields) = found else {
            bail!("--format: there is nothing in a {} that is called `{name}`", kind(found))
        };
        found = match fields.get(name) {
            Some(inner) => inner,
            None => {
                let known: Vec<&str> = fields.keys().map(String::as_str).collect();
                bail!("--format: there is no field `{name}`; there are {}", known.join(", "))
            }
        };
    }
    Ok(found)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "text",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rendered(template: &str) -> Result<String, String> {
        let item = json!({"ID": "a1", "Labels": {"app": "web"}, "Code": 0, "None": null});
        let template = template.parse::<Template>()?;
        template.render_all(&[item.as_object().cloned().unwrap()]).map_err(|error| error.to_string())
    }

    #[test]
    fn values_are_printed_by_path_and_as_json() {
        for (template, text) in [
            ("{{.ID}}", "a1\n"),
            ("{{ .ID }}\\t{{.Code}}{{.None}}!", "a1\t0!\n"),
            ("{{.Labels.app}}", "web\n"),
            ("{{json .ID}} {{json .Labels}}", "\"a1\" {\"app\":\"web\"}\n"),
            ("no action", "no action\n"),
            ("table {{.ID}}\\t{{.Code}}", "ID  CODE\na1  0\n"),
        ] {
            assert_eq!(rendered(template).as_deref(), Ok(text), "{template}");
        }
        let whole: Value = serde_json::from_str(&rendered("json").unwrap()).unwrap();
        assert_eq!(whole["Labels"]["app"], "web");
    }

    #[test]
    fn what_is_unknown_is_refused_with_what_there_is() {
        for (template, error) in [
            ("{{.ID", "without"),
            ("{{range .}}", "is not known"),
            ("{{ID}}", "is not known"),
            ("{{.Labels | len}}", "is not known"),
            ("{{.Name}}", "there are Code, ID, Labels, None"),
            ("{{.ID.More}}", "nothing in a text"),
        ] {
            let refused = rendered(template).unwrap_err();
            assert!(refused.contains(error), "{template}: {refused}");
        }
    }
}
