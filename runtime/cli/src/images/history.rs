//! `husk history`: the steps by which an image was built.

use husk_config::Config;
use serde_json::Value;

use super::text;
use crate::client;
use crate::output::table;

/// Columns of a step's command, unless all of it is asked for.
const COMMAND_COLUMNS: usize = 60;

/// Shows the steps by which an image was built, the last one first.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk history debian:12")]
pub struct Arguments {
    /// A name, an id, or the beginning of an id.
    image: String,
    /// Print whole commands.
    #[arg(long)]
    no_trunc: bool,
}

/// Prints the table.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::images(&config.socket).await?;
    let (_, info) = super::one(&mut client, &arguments.image).await?;
    print!("{}", table(&["CREATED", "CREATED BY", "COMMENT"], &rows(&info, arguments.no_trunc)));
    Ok(())
}

fn rows(info: &Value, whole: bool) -> Vec<[String; 3]> {
    let history = info.pointer("/imageSpec/history").and_then(Value::as_array);
    let text_of = |step: &Value, field: &str| {
        text::printable(step.get(field).and_then(Value::as_str).unwrap_or_default())
    };
    let columns = if whole { usize::MAX } else { COMMAND_COLUMNS };
    let row = |step: &Value| {
        let command: String = text_of(step, "created_by").chars().take(columns).collect();
        [text::time(&text_of(step, "created")), command, text_of(step, "comment")]
    };
    history.into_iter().flatten().rev().map(row).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_step_comes_first_and_moves_no_cursor() {
        let long = "x".repeat(100);
        let info = json!({"imageSpec": {"history": [
            {"created": "2026-01-02T03:04:05Z", "created_by": "/bin/sh -c \u{1b}[2Jtrue", "comment": "c"},
            {"created_by": long},
            {"created": 7},
        ]}});
        let shown = rows(&info, false);
        assert_eq!(shown[2], ["2026-01-02 03:04:05", "/bin/sh -c  [2Jtrue", "c"]);
        assert_eq!((shown.len(), shown[1][1].len(), shown[0][0].as_str()), (3, 60, ""));
        assert_eq!(rows(&info, true)[1][1].len(), 100);
        assert!(rows(&json!({"imageSpec": {"history": {}}}), false).is_empty());
    }
}
