//! `husk console`: the last lines of the guest's kernel and agent.

use std::io::{IsTerminal, Write};

use anyhow::bail;
use husk_config::Config;

use super::client;

/// Prints the last lines of the console of a pod's guest.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The pod's id, the beginning of its id, its name, or NAMESPACE/NAME. While
    /// huskd does not run, only the id works.
    pod: String,
}

/// Prints the console: as it is into a pipe or a file, and on a terminal so that the guest
/// cannot command the terminal.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let (id, control) = client::vm(config, &arguments.pod).await?;
    if let Err(error) = control.info().await {
        bail!("the VM of pod {id} does not run: {error}");
    }
    let text = control.console().await;
    let mut output = std::io::stdout();
    let text = if output.is_terminal() { visible(&text) } else { text };
    output.write_all(text.as_bytes())?;
    Ok(output.flush()?)
}

/// A text with its control characters escaped. A terminal takes those for
/// commands: to overwrite its lines, to retitle its window, or to type
/// an answer into the shell. Characters that turn the direction of writing can
/// disguise a text, too.
fn visible(text: &str) -> String {
    let mut visible = String::with_capacity(text.len());
    for character in text.replace("\r\n", "\n").chars() {
        let turns = matches!(character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if turns || character.is_control() && !matches!(character, '\n' | '\t') {
            visible.extend(character.escape_default());
        } else {
            visible.push(character);
        }
    }
    visible
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_given_no_commands() {
        let text = "boot\tok\r\n\u{1b}]0;title\u{7}\u{9b}2J\rover\u{8}\u{7f}\0 \u{202e}txt.exe é 漢\n";
        assert_eq!(
            visible(text),
            "boot\tok\n\\u{1b}]0;title\\u{7}\\u{9b}2J\\rover\\u{8}\\u{7f}\\u{0} \\u{202e}txt.exe é 漢\n"
        );
        assert!(
            !visible(text).chars().any(|character| character.is_control() && !"\n\t".contains(character))
        );
    }
}
